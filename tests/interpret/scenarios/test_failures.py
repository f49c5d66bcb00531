import numpy as np
import pytest

from mmsae.errors import InputError
from mmsae.interpret.scenarios.failures import failure_slices
from mmsae.interpret.scenarios.options import Mining
from tests.helpers.scenarios import concepts_of, independent


def planted(seed, n=6000, wrong=0.6):
    """A model that is wrong on red and night, and in 2 % of all other items."""
    table = independent(n, 20, seed, (0.05, 0.3))
    rng = np.random.default_rng(seed)
    table[:, 0], table[:, 1] = rng.random(n) < 0.25, rng.random(n) < 0.25
    both = table[:, 0] & table[:, 1]
    failed = rng.random(n) < np.where(both, wrong, 0.02)
    return concepts_of(table, ["red", "night", *(f"c{j}" for j in range(18))]), failed, rng.random(n) < 0.5, both


def test_a_planted_slice_is_the_first_and_its_lift_right():
    for seed in range(3):
        concepts, failed, test, both = planted(seed)
        slices, about = failure_slices(concepts, failed, test)
        assert slices[0].name == "red & night" and slices[0].query == "#0 & #1"
        true = failed[test & both].mean() / failed[test].mean()
        assert slices[0].lift == pytest.approx(true)
        assert slices[0].lift == pytest.approx(0.6 / (0.6 / 16 + 0.02 * 15 / 16), rel=0.1)
        assert slices[0].low <= slices[0].rate <= slices[0].high
        assert len(slices) == 1  # red alone, night alone and the parts of both are near-duplicates
        assert about["candidates"] > 3 and about["test_items"] == test.sum()


def test_shuffled_failures_have_no_slices():
    found = 0
    for seed in range(6):
        concepts, failed, test, _ = planted(seed)
        slices, _ = failure_slices(concepts, np.random.default_rng(seed).permutation(failed), test)
        found += len(slices)
    assert found == 0


def test_two_slices_are_both_found():
    concepts, failed, test, _ = planted(0)
    table = concepts.table.toarray()
    other = table[:, 5] & table[:, 6]
    failed = failed | (other & (np.random.default_rng(3).random(len(failed)) < 0.9))
    slices, _ = failure_slices(concepts, failed, test)
    assert {s.name for s in slices} == {"red & night", "c3 & c4"}
    assert sum(s.new for s in slices) <= failed[test].sum()


def test_items_without_a_verdict_are_left_out():
    concepts, failed, test, _ = planted(1)
    value = failed.astype(float)
    value[::3] = np.nan
    slices, about = failure_slices(concepts, value, test)
    keep = np.arange(len(value)) % 3 != 0
    assert about["test_items"] == (keep & test).sum() and slices[0].name == "red & night"
    with pytest.raises(InputError, match="the train half has 0 failures"):
        failure_slices(concepts, np.zeros(len(failed)), test)


def test_options_that_have_no_meaning_are_refused():
    with pytest.raises(InputError, match="order is 4"):
        Mining(order=4).check()
    with pytest.raises(InputError, match=r"present is 1\.5"):
        Mining(present=1.5).check()


def test_a_slice_holds_of_as_many_items_where_it_is_judged():
    """Two failures in two items pass any test of their kind, and say nothing to who reads the list."""
    n = 4000
    test = np.arange(n) >= n // 2
    rng = np.random.default_rng(0)
    failed = rng.random(n) < 0.01
    table = np.zeros((n, 3), bool)
    table[:40, 0] = table[n // 2 : n // 2 + 4, 0] = True  # 40 items where it is found, 4 where it is judged
    table[:, 1:] = rng.random((n, 2)) < 0.2
    failed[table[:, 0]] = True
    concepts = concepts_of(table)
    for support, found in ((5, []), (4, ["c0"])):
        slices, about = failure_slices(concepts, failed, test, Mining(support=support))
        assert [s.name for s in slices] == found and about["candidates"] > 0
