import numpy as np
import pytest
from scipy.sparse import csr_matrix

from mmsae.errors import InputError
from mmsae.interpret.scenarios.suite import (
    build_suite,
    controls,
    farthest_points,
    read_pairs,
    suite_accuracy,
    write_suite,
)
from mmsae.shards import expand
from mmsae.world.generator.scene import CONCEPTS
from mmsae.world.generator.shards import write_world
from tests.helpers.scenarios import concepts_of, independent


def test_farthest_points_are_spread():
    rng = np.random.default_rng(0)
    groups = np.eye(5)[np.repeat(np.arange(5), 20)] + 0.01 * rng.random((100, 5))
    for start in range(0, 100, 13):
        chosen = farthest_points(csr_matrix(np.roll(groups, -start, 0)), 5)
        assert len({(start + int(i)) % 100 // 20 for i in chosen}) == 5
    assert farthest_points(csr_matrix(groups), 200).tolist() != list(range(100))
    assert (
        len(farthest_points(csr_matrix(groups), 200))
        == 100
        == len(set(farthest_points(csr_matrix(groups), 200).tolist()))
    )


def test_controls_differ_in_the_dropped_concept_alone_where_there_are_such_items():
    rng = np.random.default_rng(0)
    table = independent(400, 12, 0, (0.2, 0.5))
    table[:40, :2] = True
    table[200:240] = table[:40]
    table[200:240, 0] = False  # the twins, without concept 0
    allowed = np.ones(400, bool)
    found = controls(concepts_of(table), np.arange(40), (0, 1), 0, allowed)
    assert all(off == 0 for _, off in found) and len({c for c, _ in found}) == 40
    for item, (c, _) in enumerate(found):
        differ = np.flatnonzero(table[item] != table[c])
        assert differ.tolist() == [0]
    table[200:240, 5] ^= True
    off = [o for _, o in controls(concepts_of(table), np.arange(40), (0, 1), 0, allowed)]
    assert min(off) >= 0 and max(off) >= 1
    some = controls(concepts_of(table), np.arange(40), (0, 1), 0, rng.random(400) < 0)
    assert some == [(-1, -1)] * 40


def test_the_datas_own_pairs_come_first():
    table = np.zeros((6, 3), bool)
    table[:3, :2] = True
    table[3:, 1] = True
    table[3, 2] = True
    pair = np.array([7, -1, -1, 7, -1, -1])
    found = controls(concepts_of(table), np.array([0, 1]), (0, 1), 0, np.ones(6, bool), pair)
    assert found[0] == (3, -1) and found[1] in ((4, 0), (5, 0))


def test_a_suite_is_the_same_again_and_has_nothing_that_is_not_allowed():
    table, codes = independent(500, 10, 1, (0.3, 0.5)), csr_matrix(np.random.default_rng(0).random((500, 20)))
    allowed = np.arange(500) % 3 != 0
    given = (concepts_of(table), codes, [(0, 1), (2, 3, 4)], 8)
    suite = build_suite(*given, allowed=allowed, seed=3)
    assert suite == build_suite(*given, allowed=allowed, seed=3) != build_suite(*given, allowed=allowed, seed=4)
    assert all(allowed[e.item] for e in suite)
    first = [e for e in suite if e.slice == "#0 & #1"]
    assert sum(e.role == "slice" for e in first) == 8
    for e in first:
        on = table[e.item, :2]
        assert on.all() if e.role == "slice" else on.tolist() == [e.dropped != "c0", e.dropped != "c1"]
    assert {e.dropped for e in first if e.role == "control"} == {"c0", "c1"}


def test_a_suite_of_the_world_is_written_with_its_siblings_and_measured(tmp_path):
    data = write_world(tmp_path / "shards", 400, progress=False)
    shards = [str(tmp_path / "shards")]
    pair = read_pairs(shards, data.uids, "pair")
    assert (pair == data.scenes.pair).all()
    names = list(CONCEPTS)
    concepts = concepts_of(data.concepts, names)
    allowed = np.ones(400, bool)
    situation = [(names.index("red"), names.index("circle"))]
    suite = build_suite(concepts, csr_matrix(data.concepts.astype(float)), situation, 6, allowed=allowed, pair=pair)
    own = [e for e in suite if e.role == "control" and e.off_by == -1]
    on = data.concepts[:, situation[0]]
    partner = np.arange(400) ^ 1
    assert len(own) == min(6, (on.all(1) & (on[partner].sum(1) == 1)).sum())
    assert own and all(data.scenes.pair[e.item] == data.scenes.pair[e.of] for e in own)
    n = write_suite(tmp_path / "suite", suite, expand(shards), data.uids)
    assert n == len({e.item for e in suite})
    red = [0]

    def right(sample):
        red[0] += 1
        return not {"red", "circle"} <= set(sample.meta["concepts"])

    (found,) = suite_accuracy(tmp_path / "suite", right)
    assert red[0] == n and found.accuracy == 0 and found.control == 1 and found.n == 6
    assert found.low == 0 < found.high < 1 and found.control_low < 1 == found.control_high
    assert suite_accuracy(tmp_path / "suite", right, {"#99"}) == []
    with pytest.raises(InputError, match="not in the shards"):
        write_suite(tmp_path / "other", suite, expand(shards), ["0" * 32] * 400)
    assert not list((tmp_path / "other").glob("*"))
    with pytest.raises(InputError, match="json field 'twin'"):
        read_pairs(shards, data.uids, "twin")
