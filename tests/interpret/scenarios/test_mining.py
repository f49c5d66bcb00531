from itertools import combinations

import numpy as np
import pytest
from scipy.stats import fisher_exact, hypergeom

from mmsae.interpret.scenarios import mining
from mmsae.interpret.scenarios.mining import adjusted, frequent, holding, over_represented, rarity, together
from tests.helpers.scenarios import concepts_of, independent


def test_frequent_conjunctions_are_those_of_counting(monkeypatch):
    table = independent(300, 9, 0, (0.1, 0.6))
    marked = np.random.default_rng(1).random(300) < 0.2
    monkeypatch.setattr(mining, "CHUNK", 7)
    found = frequent(concepts_of(table), 6, 3, marked)
    slow = {}
    for order in (1, 2, 3):
        for parts in combinations(range(9), order):
            on = table[:, parts].all(1)
            if on.sum() >= 6:
                slow[parts] = (int(on.sum()), int((on & marked).sum()))
    fast = {
        tuple(int(k) for k in p if k >= 0): (int(s), int(m))
        for p, s, m in zip(found.parts, found.support, found.marked, strict=True)
    }
    assert fast == slow and len(fast) > 60
    inside = holding(concepts_of(table), found).toarray()
    for s, parts in enumerate(found.parts):
        assert (inside[:, s] == table[:, parts[parts >= 0]].all(1)).all()
    assert (frequent(concepts_of(table), 6, 1).parts[:, 1] == -1).all()


def test_p_values_are_fishers():
    for both, x, y, n in ((3, 10, 8, 100), (0, 5, 6, 50), (5, 5, 9, 40)):
        table = [[both, x - both], [y - both, n - x - y + both]]
        assert np.exp(over_represented(both, x, y, n)) == pytest.approx(fisher_exact(table, "greater")[1])
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 300, (2, 500))
    both = rng.integers(np.maximum(0, x + y - 400), np.minimum(x, y) + 1)
    slow = hypergeom.sf(both - 1, 400, x, y)
    assert np.allclose(np.exp(over_represented(both, x, y, 400)), slow, rtol=1e-6, atol=1e-9)
    assert over_represented(500, 500, 500, 5000) < -1000  # where p itself is 0


def test_tests_that_were_not_made_count_in_the_adjustment():
    assert adjusted(np.array([0.001, 0.5]), 100).tolist() == [pytest.approx(0.1), 1.0]
    assert adjusted(np.array([0.001, 0.04]), 2).tolist() == [pytest.approx(0.002), pytest.approx(0.04)]
    assert len(adjusted(np.zeros(0), 10)) == 0


def test_a_planted_pair_is_the_most_surprising():
    hits = 0
    for seed in range(3):
        table = independent(5000, 20, seed)
        rng = np.random.default_rng(seed)
        rare = np.zeros((5000, 2), bool)
        both = rng.permutation(5000)[:10]
        rare[both] = True
        rare[rng.permutation(5000)[:10], 0] = rare[rng.permutation(5000)[:10], 1] = True
        table = np.concatenate([table, rare], 1)
        found = together(concepts_of(table), frequent(concepts_of(table), 5, 2))
        best = int(found.surprise.argmax())
        hits += found.found.parts[best, :2].tolist() == [20, 21] and found.q[best] < 0.05
    assert hits == 3


def test_latents_of_one_name_are_no_situation():
    table = np.zeros((200, 3))
    table[:30] = 1  # all three go together
    found = frequent(concepts_of(table), 5)
    assert len(together(concepts_of(table), found).found.support) == 4
    same = together(concepts_of(table, ["red", "dog", "red"]), found).found
    assert same.parts.tolist() == [[0, 1, -1], [1, 2, -1]]


def test_nothing_is_found_where_concepts_are_independent():
    wrong = 0
    for seed in range(20):
        table = concepts_of(independent(1000, 14, 100 + seed))
        found = together(table, frequent(table, 5, 3))
        wrong += bool((found.q < 0.05).any())
    assert wrong <= 1


def test_a_third_concept_counts_for_what_it_adds_only():
    rng = np.random.default_rng(0)
    table = independent(5000, 10, 0)
    pair = rng.random(5000) < 0.03
    table[:, 0] = pair | (rng.random(5000) < 0.01)
    table[:, 1] = pair | (rng.random(5000) < 0.01)
    found = together(concepts_of(table), frequent(concepts_of(table), 3, 3))
    pairs = found.found.parts[:, 2] < 0
    with_both = (found.found.parts[:, :2] == [0, 1]).all(1)
    assert found.surprise[pairs & with_both][0] > 2
    assert found.surprise[~pairs & with_both].max() < 1.2 and found.q[~pairs & with_both].min() > 0.05


def test_rarity_is_smoothed_and_falls_with_support():
    assert rarity(0, 98) == pytest.approx(np.log(100)) and rarity(9, 98) == pytest.approx(np.log(10))
