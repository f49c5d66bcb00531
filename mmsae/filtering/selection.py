"""Choosing a set of samples by their concepts: the set counts, not each sample alone.

The objective is that of SDM (ICLR 2026): with ``m_j(A)`` the code mass of latent j in a set A and p a distribution over
latents,

    f(A) = balance * sum_j p_j log(1 + m_j(A)) + (1 - balance) * sum_i u_i log(1 + #{a in A : bin(a) = i}).

Both parts are monotone and submodular for codes >= 0. With p the code mass of a target set the first part stands for
``-KL(p || m(A) / sum m(A))``; with p uniform and codes set to 1 where they fire it is log-coverage. A log objective is
nearly flat (a random set has nine tenths of the best value), so judge a set by its KL to the target.

Ties go to the lower uid, and items are put in the order of their uids first, so that no result depends on their order.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from mmsae.shards import draw
from mmsae.types import InputError

BIN_WEIGHTS = (0.0, 0.01, 0.99)  # SDM's, worst third to best third
BLOCK = 8  # stale gains that are brought up to date together; the result does not depend on it


class Items(NamedTuple):
    """Sparse codes of N samples (CSR), by uid."""

    uids: np.ndarray  #: ``(N,)`` array of str.
    crow: np.ndarray  #: ``(N + 1,)`` int64.
    col: np.ndarray  #: ``(nnz,)`` int64 latents.
    val: np.ndarray  #: ``(nnz,)`` float64, not negative.
    bins: np.ndarray | None = None  #: ``(N,)`` int64 quality bin of each sample, or None.

    @property
    def n(self) -> int:
        """Number of samples."""
        return len(self.uids)

    def entries(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """``(which of rows, index into col and val)`` of all entries of some rows."""
        count = self.crow[rows + 1] - self.crow[rows]
        which = np.repeat(np.arange(len(rows)), count)
        start = np.repeat(self.crow[rows] - (count.cumsum() - count), count)
        return which, start + np.arange(len(which))

    def take(self, rows: np.ndarray) -> Items:
        """Some of the samples, in this order."""
        _, at = self.entries(rows)
        crow = np.concatenate([[0], (self.crow[rows + 1] - self.crow[rows]).cumsum()])
        bins = None if self.bins is None else self.bins[rows]
        return Items(self.uids[rows], crow, self.col[at], self.val[at], bins)

    def mass(self, d_sae: int) -> np.ndarray:
        """``(d_sae,)`` code mass of each latent."""
        return np.bincount(self.col, self.val, d_sae)

    def fired(self) -> Items:
        """The same with every positive value set to 1."""
        return self._replace(val=(self.val > 0).astype(float))


def concatenate(parts: Sequence[Items]) -> Items:
    """All samples of several parts, in order."""
    shift = np.cumsum([0, *(p.crow[-1] for p in parts)])
    crow = np.concatenate([[0], *(p.crow[1:] + s for p, s in zip(parts, shift, strict=False))]).astype(np.int64)
    bins = None if any(p.bins is None for p in parts) else np.concatenate([p.bins for p in parts])
    uids, col, val = (np.concatenate([getattr(p, f) for p in parts]) for f in ("uids", "col", "val"))
    return Items(uids, crow, col, val, bins)


class Objective(NamedTuple):
    """What a set is worth."""

    p: np.ndarray  #: ``(d_sae,)`` weight of each latent; a distribution, where the value is to be compared with a KL.
    balance: float = 1.0  #: Weight of the concepts; the rest is the weight of the quality bins.
    bin_weights: tuple[float, ...] = BIN_WEIGHTS  #: ``u``, one per bin.


class State:
    """A set, as far as the objective sees it: its code mass, and how many of it are in each bin."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.m = np.zeros(len(objective.p))
        self.counts = np.zeros(len(objective.bin_weights))

    def gains(self, items: Items, rows: np.ndarray) -> np.ndarray:
        """``(len(rows),)`` what each of these samples would add, alone."""
        which, at = items.entries(rows)
        j = items.col[at]
        # summed row by row in the order of its entries: the same bits whatever else is asked for
        out = np.bincount(which, self.objective.p[j] * np.log1p(items.val[at] / (1 + self.m[j])), len(rows))
        if self.objective.balance < 1:
            u = np.asarray(self.objective.bin_weights) * np.log1p(1 / (1 + self.counts))
            out = self.objective.balance * out + (1 - self.objective.balance) * u[items.bins[rows]]
        return out

    def add(self, items: Items, row: int) -> None:
        """Put a sample into the set."""
        at = slice(items.crow[row], items.crow[row + 1])
        np.add.at(self.m, items.col[at], items.val[at])
        if items.bins is not None:
            self.counts[items.bins[row]] += 1

    def value(self) -> float:
        """``f`` of the set; 0 for the empty one."""
        o = self.objective
        concepts = float(o.p @ np.log1p(self.m))
        if o.balance == 1:
            return concepts
        return o.balance * concepts + (1 - o.balance) * float(np.asarray(o.bin_weights) @ np.log1p(self.counts))


class Selection(NamedTuple):
    """A chosen set."""

    rows: np.ndarray  #: ``(b,)`` the samples, in the order in which they were chosen.
    gains: np.ndarray  #: ``(b,)`` what each added; never increases for the greedy ones (up to rounding).
    state: State  #: The set.


def value(items: Items, objective: Objective, rows: np.ndarray) -> float:
    """``f`` of a set of samples."""
    return _take(items, objective, np.asarray(rows, dtype=np.int64)).state.value()


def _take(items: Items, objective: Objective, rows: np.ndarray) -> Selection:
    state, gains = State(objective), []
    for row in rows:
        gains.append(state.gains(items, np.array([row]))[0])
        state.add(items, row)
    return Selection(rows, np.array(gains), state)


def _check(items: Items, objective: Objective, b: int) -> None:
    if not 0 <= b <= items.n:
        raise InputError(f"cannot choose {b} of {items.n} samples")
    if len(items.val) and items.val.min() < 0:
        raise InputError(f"set selection needs codes that are not negative; the smallest here is {items.val.min():.3g}")
    if objective.balance < 1 and items.bins is None:
        raise InputError(f"balance is {objective.balance}, but the samples have no quality bins")


def lazy_greedy(items: Items, objective: Objective, b: int, progress: bool = False) -> Selection:
    """The b samples that full greedy chooses (1 - 1/e of the best), by a heap of gains that may be out of date.

    Gains only shrink as the set grows, so a gain that is up to date and on top of the heap is the largest.

    Raises:
        InputError: b is larger than the number of samples, or a code is negative.
    """
    _check(items, objective, b)
    order = np.argsort(items.uids, kind="stable")  # a place in this order stands for a sample
    state, chosen, gains = State(objective), [], []
    heap = [(-g, i, 0) for i, g in enumerate(state.gains(items, order).tolist())]
    heapq.heapify(heap)
    with tqdm(total=b, desc="select", unit="sample", disable=not progress) as bar:
        while len(chosen) < b:
            if heap[0][2] == len(chosen):
                g, i, _ = heapq.heappop(heap)
                state.add(items, order[i])
                chosen.append(order[i])
                gains.append(-g)
                bar.update()
                continue
            stale = []
            while heap and heap[0][2] < len(chosen) and len(stale) < BLOCK:
                stale.append(heapq.heappop(heap)[1])
            for i, g in zip(stale, state.gains(items, order[stale]).tolist(), strict=True):
                heapq.heappush(heap, (-g, i, len(chosen)))
    return Selection(np.array(chosen, dtype=np.int64), np.array(gains), state)


def stochastic_greedy(items: Items, objective: Objective, b: int, eps: float = 0.1, seed: int = 0) -> Selection:
    """Greedy over a random sample of ``n / b * ln(1 / eps)`` candidates a step (1 - 1/e - eps in expectation).

    Raises:
        InputError: What :func:`lazy_greedy` refuses, or ``eps`` outside (0, 1).
    """
    _check(items, objective, b)
    if not 0 < eps < 1:
        raise InputError(f"eps is {eps}; it must lie between 0 and 1")
    rng, left = np.random.default_rng(seed), np.argsort(items.uids, kind="stable")
    size = math.ceil(items.n / max(b, 1) * math.log(1 / eps))
    state, chosen, gains = State(objective), [], []
    for _ in range(b):
        at = np.sort(rng.choice(len(left), min(size, len(left)), replace=False, shuffle=False))
        found = state.gains(items, left[at])
        best = np.lexsort((items.uids[left[at]], -found))[0]
        chosen.append(left[at[best]])
        gains.append(found[best])
        state.add(items, chosen[-1])
        left[at[best]] = left[-1]
        left = left[:-1]
    return Selection(np.array(chosen, dtype=np.int64), np.array(gains), state)


def modular(items: Items, objective: Objective, b: int) -> Selection:
    """The control: the b samples with the most ``sum_j p_j z_j``, each judged alone."""
    _check(items, objective, b)
    which, at = items.entries(np.arange(items.n))
    mass = np.bincount(which, objective.p[items.col[at]] * items.val[at], items.n)
    return _take(items, objective, np.lexsort((items.uids, -mass))[:b])


def random_set(items: Items, objective: Objective, b: int, seed: int = 0) -> Selection:
    """The other control: b samples at random, by a hash of seed and uid."""
    _check(items, objective, b)
    return _take(items, objective, np.lexsort((items.uids, [draw(u, seed) for u in items.uids]))[:b])


def quota(n: int, keep: float, oversample: float = 4.0) -> int:
    """Candidates that a tar of n samples sends to the second stage: ``oversample`` times its share, at most all."""
    return min(n, math.ceil(oversample * keep * n))


def two_stage(parts: Sequence[Items], objective: Objective, b: int, keep: float, oversample: float = 4.0) -> Selection:
    """Lazy greedy inside every part, then over the candidates of all; rows count through the parts in order.

    With one part it is :func:`lazy_greedy`; with four times each part's share it was so on the generated world too.
    The guarantee falls with the number of parts ((1 - 1/e) / 2 in expectation where parts are random).
    """
    first = [np.sort(lazy_greedy(p, objective, quota(p.n, keep, oversample)).rows) for p in parts]
    found = lazy_greedy(concatenate([p.take(rows) for p, rows in zip(parts, first, strict=True)]), objective, b)
    starts = np.cumsum([0, *(p.n for p in parts)])
    rows = np.concatenate([r + s for r, s in zip(first, starts, strict=False)])
    return found._replace(rows=rows[found.rows])


def distribution(mass: np.ndarray, smooth: float = 0.0) -> np.ndarray:
    """Code mass as a distribution, ``smooth`` of it spread evenly (a few hundred items leave latents without mass).

    Raises:
        InputError: There is no mass.
    """
    if not mass.sum() > 0:
        raise InputError("no latent fired in any of the samples that are to give a distribution of concepts")
    return (1 - smooth) * mass / mass.sum() + smooth / len(mass)


def kl(p: np.ndarray, mass: np.ndarray, smooth: float = 1e-6) -> float:
    """``KL(p || mass / sum mass)`` in nats; ``smooth`` keeps it finite where the set misses a latent."""
    on = p > 0
    return float((p[on] * np.log(p[on] / distribution(mass, smooth)[on])).sum())
