"""Phrases of captions for latents: beside a loop over latents and words."""

import numpy as np
from scipy.sparse import csr_matrix

from mmsae.interpret.evidence.folder import SparseRows
from mmsae.interpret.names.captions import caption_scores, count_phrases
from mmsae.metrics.concepts.ngrams import log_odds

WORDS = "red green blue circle square".split()


def world(n=120, seed=0):
    rng = np.random.default_rng(seed)
    has = rng.random((n, 5)) < 0.3
    captions = [
        f"a {' '.join(w for w, h in zip(WORDS, row, strict=True) if h)} thing".replace("  ", " ") for row in has
    ]
    z = has[:, :3] * rng.uniform(0.5, 1.5, (n, 3))
    m = csr_matrix(z.astype(np.float32))
    return captions, z, SparseRows(m.indptr, m.indices, m.data, 3)


def test_scores_equal_a_loop():
    captions, z, codes = world()
    keep = np.arange(120) % 2 == 0
    captions[4] = ""
    table = caption_scores(codes, np.arange(3), captions, keep, longest=1)
    assert set(table.phrases) == set(WORDS)  # "thing" is in more than half of them and says nothing
    rows = [i for i in range(120) if keep[i] and captions[i]]
    got = table.block(0, 3)
    for j in range(3):
        weight = z[rows, j].astype(np.float32) / z[rows, j].max()
        for v, word in enumerate(table.phrases):
            has = np.array([word in captions[i].split() for i in rows])
            args = [(weight * has).sum()], [weight.sum()], [(has & (weight == 0)).sum()], [(weight == 0).sum()]
            y, n, other, m = (np.array(a, float) for a in args)
            want = log_odds(y[:, None], n, other[:, None], m, np.array([has.mean()]))
            assert np.isclose(got[j, v], want[0, 0], atol=1e-3)
    assert [table.phrases[k] for k in got.argmax(1)] == ["red", "green", "blue"]
    assert np.allclose(table.block(1, 3), got[1:])


def test_captions_without_words_and_blocks():
    assert count_phrases(["", "of the"])[0] == []
    phrases, has = count_phrases(["red circle", "red square", "blue circle"] * 4, 2, rare=2)
    assert set(phrases) == {"blue", "square", "red circle", "red square", "blue circle"}
    assert has.shape == (12, 5)
