"""Exchange: a chosen set made better by swaps, by the divergence itself instead of its submodular stand-in.

Greedy maximises ``sum_j p_j log(1 + m_j)``: it leaves out ``log sum_j m_j`` (so it likes samples with much code mass,
whatever they are of) and has the 1 in the logarithm. Both are there for its guarantee, which means little where the
objective is nearly flat. Swaps need no guarantee: they start from what greedy chose and can only make it better.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from mmsae.filtering.selection import Items, Objective

ROUNDS = 500
_FLOOR = 1e-9


class Exchanged(NamedTuple):
    """A set after swaps."""

    rows: np.ndarray  #: ``(b,)`` samples; those that stayed in their order, then those that came in.
    swaps: int  #: How many came in.
    rounds: int  #: How often the pool was looked at.


class _Set:
    """What the divergence needs of a set: code mass, and how many are in each bin."""

    def __init__(self, items: Items, objective: Objective, inside: np.ndarray) -> None:
        self.items, self.o = items, objective
        some = items.take(np.flatnonzero(inside))
        self.m = some.mass(len(objective.p)) + _FLOOR
        self.counts = np.zeros(len(objective.bin_weights))
        if objective.balance < 1:
            self.counts += np.bincount(some.bins, minlength=len(self.counts))

    def value(self) -> float:
        """``balance * (sum p log m - log sum m) + (1 - balance) * bins``; minus the KL up to a constant."""
        o = self.o
        out = o.balance * float(o.p @ np.log(self.m) - np.log(self.m.sum()))
        return out + (1 - o.balance) * float(np.asarray(o.bin_weights) @ np.log1p(self.counts))

    def change(self, rows: np.ndarray, sign: int) -> np.ndarray:
        """``(len(rows),)`` what the value changes by when each is put in (+1) or taken out (-1), alone."""
        which, at = self.items.entries(rows)
        j, z = self.items.col[at], sign * self.items.val[at]
        out = np.bincount(which, self.o.p[j] * np.log(np.maximum(1 + z / self.m[j], _FLOOR)), len(rows))
        total = np.bincount(which, z, len(rows)) / self.m.sum()
        out = self.o.balance * (out - np.log(np.maximum(1 + total, _FLOOR)))
        if self.o.balance < 1:
            u = np.asarray(self.o.bin_weights) * np.log1p(sign / np.maximum(1 + self.counts, 1 + (sign < 0)))
            out += (1 - self.o.balance) * u[self.items.bins[rows]]
        return out


def exchange(
    items: Items, objective: Objective, rows: np.ndarray, rounds: int = ROUNDS, progress: bool = False
) -> Exchanged:
    """Swap samples of a set for others while ``-KL(p || m / sum m)`` (with the quality bins) grows.

    A round takes the samples out that are worth least and puts in those worth most, as many at once as still help: an
    eighth of the set at first, half as many where that overshoots, until single swaps do not help. So the number of
    rounds hardly depends on the size of the set; each costs two passes over the codes. The value never falls.

    ``items`` are all candidates and ``rows (b,)`` the set to begin with; ``rounds`` is the most there are.
    """
    order = np.argsort(items.uids, kind="stable")  # ties go to the lower uid, whatever the order of the items
    own, inside = items.take(order), np.zeros(items.n, dtype=bool)
    place = np.empty(items.n, dtype=np.int64)
    place[order] = np.arange(items.n)
    inside[place[rows]] = True
    state = _Set(own, objective, inside)
    best, n, came, done = state.value(), max(1, len(rows) // 8), {}, 0
    n = min(n, items.n - len(rows))
    for _ in tqdm(range(rounds), desc="exchange", unit="round", disable=not progress):
        if n < 1:
            break
        done += 1
        now, others = np.flatnonzero(inside), np.flatnonzero(~inside)
        out = now[np.argsort(-state.change(now, -1), kind="stable")[:n]]
        left = inside.copy()
        left[out] = False
        into = others[np.argsort(-_Set(own, objective, left).change(others, +1), kind="stable")[:n]]
        trial = left.copy()
        trial[into] = True
        after = _Set(own, objective, trial)
        value = after.value()
        if value > best + 1e-12:
            inside, state, best = trial, after, value
            came |= dict.fromkeys(into.tolist())
        else:
            n //= 2
    before = set(place[rows].tolist())
    new = np.array([i for i in came if inside[i] and i not in before], dtype=np.int64)
    return Exchanged(np.concatenate([rows[inside[place[rows]]], order[new]]), len(new), done)
