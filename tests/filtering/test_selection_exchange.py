"""Swaps after the greedy choice: the divergence never rises, and every change is that of the definition."""

import numpy as np
import pytest

from mmsae.filtering.selection import Objective, distribution, kl, lazy_greedy, random_set
from mmsae.filtering.selection_exchange import _FLOOR, _Set, exchange
from tests.filtering.test_selection import F, P, from_dense, make


def naive(dense, items, o, rows):
    m = dense[rows].sum(0) + _FLOOR
    out = o.balance * ((o.p * np.log(m)).sum() - np.log(m.sum()))
    for i, u in enumerate(o.bin_weights):
        out += (1 - o.balance) * u * np.log(1 + (items.bins[rows] == i).sum())
    return out


@pytest.mark.parametrize("balance", [1.0, 0.6])
def test_changes_are_differences_of_the_value(balance):
    items, dense = make()
    o = Objective(P, balance)
    inside = np.zeros(items.n, dtype=bool)
    inside[:20] = True
    state = _Set(items, o, inside)
    assert state.value() == pytest.approx(naive(dense, items, o, np.arange(20)))
    out, into = state.change(np.arange(20), -1), state.change(np.arange(20, 60), +1)
    for i in (0, 7, 19):
        rest = np.delete(np.arange(20), i)
        assert out[i] == pytest.approx(naive(dense, items, o, rest) - state.value(), abs=1e-7)
    for i in (20, 44):
        with_it = np.append(np.arange(20), i)
        assert into[i - 20] == pytest.approx(naive(dense, items, o, with_it) - state.value(), abs=1e-7)


@pytest.mark.parametrize("ties", [False, True])
def test_the_set_keeps_its_size_and_gets_no_worse(ties):
    items, _ = make(200, ties=ties)
    o = Objective(P)
    for start in (lazy_greedy(items, o, 30).rows, random_set(items, o, 30).rows):
        found = exchange(items, o, start)
        assert len(set(found.rows.tolist())) == 30
        assert kl(P, items.take(found.rows).mass(F)) <= kl(P, items.take(start).mass(F)) + 1e-9
        stayed = len(set(found.rows.tolist()) & set(start.tolist()))
        assert found.swaps == 30 - stayed and found.rows[:stayed].tolist() == [r for r in start if r in found.rows]
        assert exchange(items, o, found.rows).swaps == 0  # nothing is left to gain


def test_the_order_of_the_items_does_not_matter():
    items, _ = make(150, ties=True)
    mixed = items.take(np.random.default_rng(1).permutation(items.n))
    for o in (Objective(P), Objective(P, 0.6)):
        a, b = (x.uids[exchange(x, o, lazy_greedy(x, o, 20).rows).rows].tolist() for x in (items, mixed))
        assert a == b


def test_it_ends_near_the_target_where_greedy_likes_mass():
    """Three kinds; one of the two unwanted ones has ten times the code mass and a little of what is wanted."""
    rng = np.random.default_rng(0)
    kind = rng.choice(3, 900, p=[0.6, 0.3, 0.1])
    dense = np.zeros((900, F))
    for i, k in enumerate(kind):
        dense[i, k * 4 + rng.choice(4, 2, replace=False)] = rng.random(2) + 0.5
    loud = np.flatnonzero(kind == 0)
    dense[loud[:, None], [0, 1]] += 10
    dense[loud, 8] += 3
    items = from_dense(dense, np.array([f"{i:032x}" for i in range(900)]))
    mass = np.zeros(F)
    mass[8:] = 1
    p = distribution(mass, 0.01)
    o = Objective(p)
    greedy = lazy_greedy(items, o, 60).rows
    before, after = (kl(p, items.take(r).mass(F)) for r in (greedy, exchange(items, o, greedy).rows))
    assert after < 0.1 * before and after < 0.2 * kl(p, items.take(random_set(items, o, 60).rows).mass(F))


def test_everything_chosen_leaves_nothing_to_swap():
    items, _ = make(20)
    found = exchange(items, Objective(P), np.arange(20))
    assert found.rows.tolist() == list(range(20)) and found.rounds == 0
