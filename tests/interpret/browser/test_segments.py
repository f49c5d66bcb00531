import numpy as np
import pytest
from scipy.sparse import csr_matrix

from mmsae.interpret.browser.segments import best_of_rows, bisect, ranges


@pytest.mark.parametrize("side", ["left", "right"])
def test_bisect_is_searchsorted_in_every_segment(side):
    rng = np.random.default_rng(0)
    parts = [np.sort(rng.integers(0, 9, n)) for n in (0, 5, 1, 12, 0)]
    start = np.cumsum([0, *map(len, parts)])
    segment, query = rng.integers(0, 5, 200), rng.integers(-1, 10, 200)
    found = bisect(start, np.concatenate(parts), segment, query, side)
    assert found.tolist() == [
        start[s] + np.searchsorted(parts[s], q, side) for s, q in zip(segment, query, strict=True)
    ]


def test_bisect_in_nothing():
    assert bisect(np.zeros(3, int), np.zeros(0), np.array([0, 1]), np.array([4, 5])).tolist() == [0, 0]


def test_ranges():
    assert ranges(np.array([5, 0, 9]), np.array([2, 0, 3])).tolist() == [5, 6, 9, 10, 11]
    assert ranges(np.zeros(0, int), np.zeros(0, int)).tolist() == []


def test_best_of_rows_is_a_sort_of_each_row():
    rng = np.random.default_rng(1)
    dense = np.round(rng.random((20, 15)) * (rng.random((20, 15)) < 0.4), 1) - 0.1 * (rng.random((20, 15)) < 0.2)
    column, value = best_of_rows(csr_matrix(dense), 4)
    for row, c, v in zip(dense, column, value, strict=True):
        order = [j for j in np.lexsort((np.arange(15), -row)) if row[j] > 0][:4]
        assert c.tolist() == order + [-1] * (4 - len(order))
        assert np.allclose(v, [*row[order], *[0] * (4 - len(order))])


@pytest.mark.parametrize("k", [1, 3, 8])
def test_best_of_long_rows_is_a_sort_too(k):
    rng = np.random.default_rng(2)
    dense = np.round(rng.random((50, 400)), 2) * (rng.random((50, 400)) < rng.random((50, 1)))
    column, value = best_of_rows(csr_matrix(dense), k)
    order = np.lexsort((np.broadcast_to(np.arange(400), dense.shape), -dense), axis=1)[:, :k]
    best = np.take_along_axis(dense, order, 1)
    assert (np.where(best > 0, order, -1) == column).all() and np.allclose(value, best)
