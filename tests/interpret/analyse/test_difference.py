"""Differences of corpora: planted ones first, none where there is none, and sides that change places."""

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from mmsae.interpret.analyse.corpora import whole
from mmsae.interpret.analyse.difference import compare, difference, matched
from mmsae.interpret.analyse.options import Differing
from mmsae.interpret.evidence.folder import Evidence
from mmsae.types import InputError
from tests.helpers.evidence import write_evidence


def drawn(rng, n, share):
    return csr_matrix((rng.random((n, len(share))) < share).astype(np.int32))


def background(rng, d=200):
    return rng.random(d) ** 2 * 0.5


@pytest.mark.parametrize("seed", range(5))
def test_a_planted_difference_is_first(seed):
    """Oracle O13: 20 % against 5 %."""
    rng = np.random.default_rng(seed)
    share = background(rng)
    share[17] = 0.05
    a = drawn(rng, 1500, np.where(np.arange(200) == 17, 0.2, share))
    found = difference(a, drawn(rng, 1500, share))
    assert found.order[0] == 17 == found.found()[0] and found.q[17] < 1e-9
    assert found.shares.low[17] < 0.15 < found.shares.high[17]


def test_halves_of_one_corpus_seldom_differ():
    """Oracle O13: in at most 5 % of the runs (of 200, four standard deviations above: 11 %) is anything called."""
    rng = np.random.default_rng(0)
    wrong = [
        len(difference(*(drawn(rng, 300, share) for _ in range(2))).found()) > 0
        for share in (background(rng) for _ in range(200))
    ]
    assert np.mean(wrong) < 0.11
    same = drawn(rng, 300, background(rng))
    assert len(difference(same, same).found()) == 0 and difference(same, same).shares.p == pytest.approx(1)


def test_sides_change_places():
    rng = np.random.default_rng(3)
    a, b = drawn(rng, 400, background(rng)), drawn(rng, 300, background(rng))
    one, other = difference(a, b), difference(b, a)
    for field in ("difference", "relative", "z"):
        assert getattr(one.shares, field) == pytest.approx(-getattr(other.shares, field))
    assert one.q == pytest.approx(other.q, nan_ok=True) and one.order.tolist() == other.order.tolist()
    assert one.leader.tolist() == other.leader.tolist()


def test_rare_latents_are_no_tests():
    a = csr_matrix(np.array([[1, 0, 1]] * 30, np.int32))
    b = csr_matrix(np.array([[0, 0, 1]] * 30, np.int32))
    found = difference(a, b, min_items=1)
    assert found.order.tolist() == [0, 2] and np.isnan(found.q[1]) and found.q[0] == found.shares.p[0] * 2
    assert difference(a, b, min_items=40).order.tolist() == [2]
    assert [r["latent"] for r in found.rows({0: "red"})] == [0, 2] and found.rows({0: "red"})[0]["name"] == "red"


@pytest.mark.parametrize(("order", "first"), [("z", 0), ("difference", 1), ("relative", 2)])
def test_what_comes_first(order, first):
    n = 1000
    hits = {0: (120, 30), 1: (600, 500), 2: (12, 0)}  # z 7.6, 4.5, 3.5; differences .09, .1, .012; relative .75, .17, 1
    a, b = (np.zeros((n, 3), np.int32) for _ in range(2))
    for j, (x, y) in hits.items():
        a[:x, j], b[:y, j] = 1, 1
    found = difference(csr_matrix(a), csr_matrix(b), Differing(order=order, same=1.1))
    assert found.found()[0] == first


def test_latents_that_fire_together_are_listed_once():
    rng = np.random.default_rng(0)
    a, b = np.zeros((500, 4), np.int32), np.zeros((500, 4), np.int32)
    a[:200, 0], b[:20, 0] = 1, 1
    a[:, 1], b[:, 1] = a[:, 0], b[:, 0]
    a[:5, 1] = 0  # nearly the same items
    a[100:300, 2] = 1  # half of them
    a[:, 3], b[:, 3] = rng.random((2, 500)) < 0.3
    found = difference(csr_matrix(a), csr_matrix(b))
    assert sorted(found.found().tolist()) == [0, 2] and found.leader[:3].tolist() == [0, 0, 2]


def folder(path, z, **more):
    return Evidence(write_evidence(path, {"image": z[:, None]}, **more))


def test_pairs_see_what_halves_do_not(tmp_path):
    """Every item loses latent 3 now and then: within items that is plain, between two sets it drowns."""
    rng = np.random.default_rng(0)
    z = (rng.random((300, 8)) < 0.5).astype(float)
    changed = z.copy()
    changed[np.flatnonzero(z[:, 3])[:14], 3] = 0
    back = rng.permutation(300)
    a, b = folder(tmp_path / "a", z), folder(tmp_path / "b", changed)
    plain, *_ = compare(whole(a), whole(b), "image", Differing())
    paired, left, right = compare(whole(a), whole(b), "image", Differing(paired="uid"))
    assert len(plain.found()) == 0 and paired.found().tolist() == [3]
    assert paired.shares.p[3] == pytest.approx(2 * 0.5**14) and left.rows.tolist() == right.rows.tolist()
    one, other = matched(whole(a)._replace(rows=back[:50]), whole(b), "key")
    assert one.rows.tolist() == other.rows.tolist() == back[:50].tolist()


def test_copies(tmp_path):
    z = np.ones((10, 2))
    e = folder(tmp_path / "e", z, copies=[-1] + [0] * 9)
    other = folder(tmp_path / "o", z)
    assert compare(whole(e), whole(other), "image", Differing())[0].n == (1, 10)
    assert compare(whole(e), whole(other), "image", Differing(copies=True))[0].n == (10, 10)


def test_bad_input(tmp_path):
    rng = np.random.default_rng(0)
    a, b = drawn(rng, 20, background(rng)), drawn(rng, 30, background(rng))
    with pytest.raises(InputError, match="paired sides have 20 and 30 items"):
        difference(a, b, Differing(paired="uid"))
    with pytest.raises(InputError, match="between 0 items and 30"):
        difference(a[:0], b)
    e = folder(tmp_path / "e", np.ones((4, 2)))
    with pytest.raises(InputError, match="no uid in common"):
        matched(whole(e)._replace(rows=np.array([0, 1])), whole(e)._replace(rows=np.array([2, 3])), "uid")
    with pytest.raises(InputError, match="has 2 items and 1 different values of shard"):
        matched(whole(e)._replace(rows=np.array([0, 1])), whole(e), "shard")


def test_planted_latents_come_first_of_generated_evidence(tmp_path):
    from benchmarks.analyse import PLANTED, measure, write_evidence, write_side

    evidence = write_evidence(tmp_path, 20_000, 1024, 16)
    planted = write_side(tmp_path / "a.txt", evidence)
    about, row = measure("diff", evidence, tmp_path / "out", uids=str(tmp_path / "a.txt"))
    assert {r["latent"] for r in about["first"][:PLANTED]} == set(planted.tolist())
    assert about["differences"] < PLANTED + 8 and row["memory_mb"] < 500
