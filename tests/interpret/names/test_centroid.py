"""Mean embeddings by one sparse product, beside the dense formula."""

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from mmsae.interpret.evidence.folder import SparseRows
from mmsae.interpret.names import centroid as module
from mmsae.interpret.names.centroid import centred, centroid_scores, centroids, mean_of


@pytest.mark.parametrize("rows", [65_536, 7])
def test_it_equals_the_dense_formula_whatever_the_blocks(monkeypatch, rows):
    monkeypatch.setattr(module, "ROWS", rows)
    rng = np.random.default_rng(0)
    z = rng.uniform(0.5, 2, (40, 9)) * (rng.random((40, 9)) < 0.4)
    z[:, 5] = 0
    e, keep = rng.normal(size=(40, 6)).astype(np.float32), rng.random(40) < 0.7
    m = csr_matrix(z.astype(np.float32))
    got = centroids(SparseRows(m.indptr, m.indices, m.data, 9), e, keep)
    middle = e[keep].mean(0)
    assert np.allclose(mean_of(e, keep), middle, atol=1e-6) and not mean_of(e, np.zeros(40, bool)).any()
    for j in range(9):
        w = z[keep, j]
        want = (w[:, None] * (e[keep] - middle)).sum(0) / w.sum() if w.sum() else np.zeros(6)
        assert np.allclose(got[j], want, atol=1e-5)


def test_a_vocabulary_of_one_word_is_not_centred_away():
    assert np.allclose(centred(np.array([[3.0, 4.0]])), [[0.6, 0.8]])
    two = centred(np.array([[1.0, 0.0], [0.0, 1.0]]))
    assert np.allclose(two[0], -two[1]) and np.allclose(np.linalg.norm(two, axis=1), 1)
    table = centroid_scores(np.array([[3.0, 4.0]]), np.array([0]), ["word"], np.array([[3.0, 4.0]]))
    assert table.block(0, 1)[0, 0] == pytest.approx(5)
