"""Set-level selection: the oracles of a submodular objective, against full greedy and closed forms."""

import numpy as np
import pytest

from mmsae.filtering.selection import (
    Items,
    Objective,
    State,
    concatenate,
    distribution,
    kl,
    lazy_greedy,
    modular,
    quota,
    random_set,
    stochastic_greedy,
    two_stage,
    value,
)
from mmsae.types import InputError

F = 12


def make(n=60, seed=0, ties=False):
    """Items with up to four latents each; with ties, many samples have equal codes."""
    rng = np.random.default_rng(seed)
    dense = rng.random((n, F)) * (rng.random((n, F)) < 0.25)
    if ties:
        dense = (dense[rng.integers(0, 6, n)] > 0).astype(float)
    uids = np.array([f"{x:032x}" for x in rng.permutation(10 * n)[:n]])
    return from_dense(dense, uids, rng.integers(0, 3, n)), dense


def from_dense(dense, uids, bins=None):
    row, col = dense.nonzero()
    crow = np.concatenate([[0], np.bincount(row, minlength=len(dense)).cumsum()])
    return Items(uids, crow, col, dense[row, col], bins)


def full_greedy(items, dense, objective, b):
    """Every gain by the definition of f, every step."""
    chosen = []
    for _ in range(b):
        rest = [i for i in range(items.n) if i not in chosen]
        f = {i: naive(dense, items, objective, [*chosen, i]) for i in rest}
        best = max(f.values())
        chosen.append(min((i for i in rest if f[i] > best - 1e-12), key=lambda i: items.uids[i]))
    return chosen


def naive(dense, items, o, rows):
    rows = list(rows)
    out = o.balance * (o.p * np.log(1 + dense[rows].sum(0))).sum()
    for i, u in enumerate(o.bin_weights):
        out += (1 - o.balance) * u * np.log(1 + (items.bins[rows] == i).sum())
    return out


P = distribution(np.arange(F) + 1.0)
OBJECTIVES = [Objective(P), Objective(P, 0.6), Objective(np.full(F, 1 / F))]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=["concepts", "with quality", "uniform"])
@pytest.mark.parametrize("ties", [False, True])
def test_lazy_greedy_is_full_greedy_set_by_set(objective, ties):
    items, dense = make(ties=ties)
    found = lazy_greedy(items, objective, 20)
    assert found.rows.tolist() == full_greedy(items, dense, objective, 20)
    assert (np.diff(found.gains) <= 1e-12).all()
    assert found.state.value() == pytest.approx(naive(dense, items, objective, found.rows))
    assert found.gains.sum() == pytest.approx(found.state.value())


def test_f_is_normalised_and_monotone():
    items, dense = make()
    for o in OBJECTIVES:
        assert value(items, o, np.array([], int)) == 0 == State(o).value()
        assert value(items, o, np.arange(9)) == pytest.approx(naive(dense, items, o, range(9)))
        assert (State(o).gains(items, np.arange(items.n)) >= 0).all()


def test_a_zero_code_gains_nothing():
    items, dense = make()
    dense[7] = 0
    items = from_dense(dense, items.uids, items.bins)
    assert State(OBJECTIVES[0]).gains(items, np.array([6, 7, 8]))[1] == 0
    assert lazy_greedy(items, OBJECTIVES[0], items.n).rows[-1] in np.flatnonzero(~dense.any(1))


def test_uniform_weights_and_codes_of_one_are_log_coverage():
    items, dense = make()
    rows = np.arange(0, 60, 7)
    covered = (dense[rows] > 0).sum(0)
    assert value(items.fired(), Objective(np.ones(F)), rows) == pytest.approx(np.log(1 + covered).sum())


@pytest.mark.parametrize("keep", [0.1, 0.5])
def test_two_stages_with_one_part_are_greedy(keep):
    items, _ = make()
    b = round(keep * items.n)
    one = two_stage([items], OBJECTIVES[0], b, keep)
    assert one.rows.tolist() == lazy_greedy(items, OBJECTIVES[0], b).rows.tolist()


def test_two_stages_over_parts_are_nearly_greedy():
    items, _ = make(200)
    parts = [items.take(np.arange(lo, lo + 25)) for lo in range(0, 200, 25)]
    assert concatenate(parts).col.tolist() == items.col.tolist()
    o = OBJECTIVES[0]
    found, best = two_stage(parts, o, 20, 0.1), lazy_greedy(items, o, 20)
    assert len(set(found.rows.tolist())) == 20
    assert value(items, o, found.rows) == pytest.approx(found.state.value())
    assert found.state.value() > 0.99 * best.state.value()
    assert quota(25, 0.1) == 10 and quota(25, 0.5) == 25


@pytest.mark.parametrize("choose", [lazy_greedy, stochastic_greedy, modular, random_set])
@pytest.mark.parametrize("ties", [False, True])
def test_the_order_of_the_items_does_not_matter(choose, ties):
    items, _ = make(ties=ties)
    shuffled = items.take(np.random.default_rng(1).permutation(items.n))
    for o in OBJECTIVES:
        assert shuffled.uids[choose(shuffled, o, 20).rows].tolist() == items.uids[choose(items, o, 20).rows].tolist()


def test_kl_identity():
    """argmin KL(p || m / sum m) is argmax sum p log m - log sum m, to 1e-7."""
    rng = np.random.default_rng(0)
    p, m = distribution(rng.random(F)), rng.random(F) * 50 + 0.1
    identity = (p * np.log(p)).sum() - ((p * np.log(m)).sum() - np.log(m.sum()))
    assert kl(p, m, smooth=0) == pytest.approx(identity, abs=1e-7)
    assert kl(p, p, smooth=0) == pytest.approx(0, abs=1e-12)
    m[3] = 0
    assert np.isfinite(kl(p, m)) and kl(p, m) > kl(p, p)


def test_matching_a_target_beats_random_and_modular():
    """A pool of three kinds; the target has two of them in equal parts, one of which is rare in the pool."""
    rng = np.random.default_rng(0)
    kind = rng.choice(3, 600, p=[0.7, 0.2, 0.1])
    dense = np.zeros((600, F))
    for i, k in enumerate(kind):
        dense[i, k * 4 + rng.choice(4, 2, replace=False)] = rng.random(2) + 0.5
    items = from_dense(dense, np.array([f"{i:032x}" for i in range(600)]))
    mass = np.zeros(F)
    mass[4:] = 1
    p = distribution(mass, 0.01)
    o = Objective(p)
    score = {c.__name__: kl(p, c(items, o, 60).state.m) for c in (lazy_greedy, stochastic_greedy, modular, random_set)}
    assert score["lazy_greedy"] < 0.05 and score["stochastic_greedy"] < 0.1
    assert score["lazy_greedy"] < 0.2 * score["random_set"]
    assert score["lazy_greedy"] < 0.4 * score["modular"]


def test_wrong_input_is_named():
    items, _ = make()
    for choose in (lazy_greedy, stochastic_greedy, modular, random_set):
        with pytest.raises(InputError, match="61 of 60"):
            choose(items, OBJECTIVES[0], 61)
        with pytest.raises(InputError, match="not negative"):
            choose(items._replace(val=-items.val), OBJECTIVES[0], 5)
        with pytest.raises(InputError, match=r"balance is 0\.5"):
            choose(items._replace(bins=None), Objective(P, 0.5), 5)
    with pytest.raises(InputError, match="eps is 1"):
        stochastic_greedy(items, OBJECTIVES[0], 5, eps=1)
    with pytest.raises(InputError, match="no latent fired"):
        distribution(np.zeros(F))
