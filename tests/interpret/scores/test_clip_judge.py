"""The judge without anybody to ask: beside a loop, by vectors and by words."""

import numpy as np
import pytest

from mmsae.interpret.scores import clip_judge as module
from mmsae.interpret.scores.clip_judge import judge_by_vectors, judge_by_words
from mmsae.interpret.scores.outcomes import auroc_rows


@pytest.mark.parametrize("gathered", [2**25, 50])
def test_by_vectors_equals_a_loop(monkeypatch, gathered):
    monkeypatch.setattr(module, "GATHERED", gathered)
    rng = np.random.default_rng(0)
    e, t = rng.normal(size=(30, 6)).astype(np.float32), rng.normal(size=(4, 2, 6)).astype(np.float32)
    on, off = rng.integers(0, 30, (4, 5)), rng.integers(0, 30, (4, 7))
    on[1, 3:], off[2] = -1, -1
    got = judge_by_vectors(on, off, e, t)
    for i in range(4):
        for m in range(2):
            a, b = (e[items[items >= 0]] @ t[i, m] for items in (on[i], off[i]))
            want = auroc_rows(a[None], b[None])[0] if len(b) else np.nan
            assert got[i, m] == pytest.approx(want, nan_ok=True)
    heavy = judge_by_vectors(on, off, e, t, np.tile([1.0, 0, 0, 0, 0], (4, 1)))
    assert np.allclose(heavy, judge_by_vectors(on[:, :1], off, e, t), equal_nan=True)


def test_by_words_counts_captions_that_have_the_phrase_as_words():
    captions = ["a red circle", "a red square", "blue circle, red", "reddish circles", "", "Red Circle!"]
    on, off = np.array([[0, 2, 5, -1]]), np.array([[1, 3, 4, -1]])
    got = judge_by_words(on, off, captions, [["red circle", "red", "green", None]])
    assert got[0, 0] == pytest.approx(0.5 + 2 / 3 / 2) and got[0, 1] == pytest.approx(0.5 + (1 - 1 / 2) / 2)
    assert got[0, 2] == 0.5 and np.isnan(got[0, 3])
    by_value = judge_by_words(on, off, captions, [["red circle"]], np.array([[3.0, 2, 1, 0]]))
    assert by_value[0, 0] == pytest.approx(0.5 + 4 / 6 / 2)
    assert np.isnan(judge_by_words(on, np.array([[4, 4, -1, -1]]), captions, [["red"]])[0, 0])  # no caption to compare
