import numpy as np
import pytest

from mmsae.interpret.browser.scores import read_scores
from mmsae.interpret.scores.table import ScoreRows
from mmsae.types import InputError
from tests.helpers.browser import browser, read


def write(folder):
    """Three latents with a score of two scorers, the shuffled names of them, and a latent of random weights."""
    folder.mkdir(parents=True)
    said = (",,,shuffled,random,", "image,image,image,image,image,text", "a,a,a,a,a,a")
    text = [np.array(x.split(","), object) for x in said]
    numbers = [np.array(x, np.float32) for x in ([0.9, np.nan, 0.7, 0.5, 0.6, 0.8], [0.5] * 6)]
    ends = [np.array(x, np.float32) for x in ([0.8, np.nan, 0.6, 0.4, 0.5, 0.7], [1, np.nan, 0.8, 0.6, 0.7, 0.9])]
    latent, n, named = np.array([0, 1, 5, 0, 5, 0], np.int32), np.full(6, 20, np.int32), np.ones(6, bool)
    ScoreRows(latent, *text, *numbers, n, *ends, named).write(folder)


def test_columns_rows_and_summary(tmp_path):
    write(tmp_path / "s")
    found = read_scores(tmp_path / "s", 6)
    assert list(found["columns"]) == ["score.a.image", "score.a.text"]
    assert np.allclose(found["columns"]["score.a.image"], [0.9] + [np.nan] * 4 + [0.7], equal_nan=True)
    assert found["rows"][0][0] == ["a", "image", "", 0.9, 0.5, 0.8, 1.0, 20]
    assert [r[2] for r in found["rows"][0]] == ["", "shuffled", ""] and [r[2] for r in found["rows"][5]] == [""]
    means = {(m, c): v for _, m, c, v, *_ in found["summary"]}
    assert means == {("image", ""): 0.8, ("image", "shuffled"): 0.5, ("image", "random"): 0.6, ("text", ""): 0.8}
    assert read_scores(tmp_path / "none", 6) == {}
    with pytest.raises(InputError, match="scores latent 5, the SAE has 4"):
        read_scores(tmp_path / "s", 4)


def test_they_are_on_the_pages(tmp_path):
    write(tmp_path / "s")
    folder, _ = browser(tmp_path, scores=str(tmp_path / "s"))
    assert read(folder, "main/latents/0")["scores"][5][0][:4] == ["a", "image", "", 0.7]
    assert np.isclose(read(folder, "main/table")["score.a.image"][0], 0.9)
