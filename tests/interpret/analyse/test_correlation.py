"""Concepts that go together: beside a naive table of all pairs, in blocks of any size."""

import numpy as np
import pytest
from scipy.sparse import csr_matrix, hstack

from mmsae.interpret.analyse.correlation import alike, correlate, surprising
from mmsae.metrics.shares import npmi
from mmsae.types import InputError


def binary(rng, n, d, share=0.2):
    return csr_matrix((rng.random((n, d)) < share).astype(np.int32))


def naive(x, y):
    a, b = x.toarray(), y.toarray()
    return a.T @ b, npmi(a.T @ b, a.sum(0)[:, None], b.sum(0), len(a))


@pytest.mark.parametrize("cells", [1, 37, 10**6])
def test_within_is_the_naive_table(cells):
    x = binary(np.random.default_rng(0), 300, 20)
    both, value = naive(x, x)
    found = correlate(x, least=15, cells=cells)
    i, j = np.nonzero(np.triu(both >= 15, 1))
    assert {*zip(found.a.tolist(), found.b.tolist(), strict=True)} == {*zip(i.tolist(), j.tolist(), strict=True)}
    assert found.npmi == pytest.approx(value[found.a, found.b]) and (np.diff(found.npmi) <= 0).all()
    assert found.both.tolist() == both[found.a, found.b].tolist()
    apart = np.where((both >= 15) & ~np.eye(20, dtype=bool), value, -1)
    assert found.closeness[0] == pytest.approx(apart.max(1)) and found.closeness[1] == pytest.approx(apart.max(1))
    has = apart.max(1) > -1
    assert found.partner[0][has].tolist() == apart.argmax(1)[has].tolist() and has.sum() > 10


@pytest.mark.parametrize("cells", [1, 9, 10**6])
def test_of_partners_that_are_as_close_the_first_is_told(cells):
    x = np.tile(np.repeat(np.eye(3, dtype=np.int32), 4, 0), (1, 3))  # three times the same three latents
    x = np.concatenate([x, np.zeros((4, 9), np.int32)])
    found = correlate(csr_matrix(x), least=2, cells=cells)
    assert found.partner[0].tolist() == [3, 4, 5, 0, 1, 2, 0, 1, 2] and (found.closeness[1] == 1).all()
    assert (found.a[0], found.b[0]) == (0, 3) and len(found.a) == 9


@pytest.mark.parametrize("cells", [1, 10**6])
def test_across_is_the_naive_table(cells):
    rng = np.random.default_rng(1)
    x, y = binary(rng, 200, 12), binary(rng, 200, 12, 0.3)
    both, value = naive(x, y)
    found = correlate(x, y, least=8, pairs=20, cells=cells)
    assert len(found.a) == 20 and found.npmi[-1] == pytest.approx(np.sort(value[both >= 8])[-20])
    enough = np.where(both >= 8, value, -1)
    assert found.closeness[0] == pytest.approx(enough.max(1)) and found.closeness[1] == pytest.approx(enough.max(0))
    assert found.own == pytest.approx(np.diag(enough))
    assert [c.tolist() for c in found.counts] == [x.toarray().sum(0).tolist(), y.toarray().sum(0).tolist()]


def test_what_is_shown_and_never_said():
    """Latents 0 and 1 are in images and captions alike, 2 is in images alone, 3 in captions alone, 4 nowhere."""
    rng = np.random.default_rng(0)
    x, y = np.zeros((2, 400, 5), np.int32)
    x[:, :2] = rng.random((400, 2)) < 0.3
    y[:, :2] = x[:, :2]
    x[:, 2], y[:, 3] = rng.random((2, 400)) < 0.4
    found = correlate(csr_matrix(x), csr_matrix(y), least=10)
    shown, said = found.unsaid(0, {2: "frame", 0: "dog"}), found.unsaid(1, {})
    assert shown[0]["latent"] == 2 and {r["latent"] for r in shown} == {0, 1, 2}
    assert shown[0]["name"] == "frame" and shown[0]["npmi_with_itself"] == -1 and shown[0]["same_latent_there"] == 0
    assert shown[-1]["npmi_with_itself"] == pytest.approx(1) and said[0]["latent"] == 3
    assert abs(shown[0]["npmi_with_partner"]) < 0.1


def test_names_that_are_alike():
    assert alike("dog", "dog") == 1 and alike("dog", "dogs") > 0.5 > 0.3 > alike("dog", "kitchen")
    assert alike("", "dog") is None and alike("red circle", "circle red") == 1
    rows = [{"a": 0, "b": 1, "alike": 0.9}, {"a": 0, "b": 2, "alike": 0.1}, {"a": 3, "b": 3, "alike": 0.0},
            {"a": 4, "b": 5, "alike": None}]  # fmt: skip
    assert [r["b"] for r in surprising(rows, 0.3, across=True)] == [2]
    assert [r["b"] for r in surprising(rows, 0.3, across=False)] == [2, 3]
    assert len(surprising(rows[3:], 0.3, across=False)) == 1  # nothing has a name


def test_many_latents_in_little_memory():
    """65,536 latents: what is held is pairs that occur, never 4 billion of them."""
    import tracemalloc

    rng = np.random.default_rng(0)
    item, latent = rng.integers(0, 1000, 65_536 * 6), np.repeat(np.arange(65_536), 6)
    same = csr_matrix((np.arange(1000) % 100 == 0)[:, None]).astype(np.int32)
    rest = (csr_matrix((np.ones(len(item)), (item, latent))) > 0).astype(np.int32)
    tracemalloc.start()
    found = correlate(hstack([same, same, rest], format="csr"), least=5)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (found.a[0], found.b[0], found.npmi[0]) == (0, 1, pytest.approx(1)) and peak < 300e6


def test_bad_input():
    rng = np.random.default_rng(0)
    with pytest.raises(InputError, match="sides of 30 and 20 items"):
        correlate(binary(rng, 30, 4), binary(rng, 20, 4))
    none = correlate(binary(rng, 30, 4), least=100)
    assert len(none.a) == 0 and none.rows({}) == [] and none.unsaid(0, {}) == []
