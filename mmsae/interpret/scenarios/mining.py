"""Conjunctions of concepts: which occur, how rare they are, and which go together more than chance has it.

Mining is Apriori's (Agrawal and Srikant, VLDB 1994) up to three concepts, by products of sparse tables.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mmsae.interpret.scenarios.concepts import Concepts
from mmsae.interpret.scenarios.options import Mining
from mmsae.metrics.shares import benjamini_hochberg

CHUNK = 4096  # pairs of concepts that are looked for in thirds at a time


class Conjunctions(NamedTuple):
    """S conjunctions."""

    parts: np.ndarray  #: ``(S, 3) int64`` places of their concepts, ascending, -1 where there are fewer
    support: np.ndarray  #: ``(S,) int64`` items that they hold of
    marked: np.ndarray  #: ``(S,) int64`` marked items among them

    def take(self, which: np.ndarray) -> Conjunctions:
        """Some of them."""
        return Conjunctions(*(v[which] for v in self))


def frequent(concepts: Concepts, least: int, order: int = 3, marked: np.ndarray | None = None) -> Conjunctions:
    """All conjunctions of up to ``order`` concepts that hold of at least so many items.

    Args:
        concepts: The table.
        least: Items.
        order: 1, 2 or 3.
        marked: ``(n,) bool`` items that are counted besides, such as those on which a model fails.
    """
    table = concepts.table.astype(np.int32)
    tally = (np.zeros(concepts.n) if marked is None else np.asarray(marked)).astype(np.int32)
    support = np.asarray(table.sum(0)).ravel()
    ones = np.flatnonzero(support >= least)
    parts, counts, hits = [ones[:, None]], [support[ones]], [(tally @ table)[ones]]
    if order > 1:
        i, j, n = _pairs(table, table, ones, least)
        parts.append(np.stack([i, j], 1))
        counts.append(n)
        weighted = table.multiply(tally[:, None]).tocsc()
        both = (table.T @ weighted).tocsr()
        hits.append(np.asarray(both[i, j]).ravel() if len(i) else np.zeros(0, int))
        if order > 2:
            for lo in range(0, len(i), CHUNK):
                a, b = i[lo : lo + CHUNK], j[lo : lo + CHUNK]
                pair = table[:, a].multiply(table[:, b]).tocsc()
                third = (pair.T @ table).tocoo()
                keep = (third.col > b[third.row]) & (third.data >= least)
                row, k = third.row[keep], third.col[keep]
                parts.append(np.stack([a[row], b[row], k], 1))
                counts.append(third.data[keep])
                fails = (pair.T @ weighted).tocsr()
                hits.append(np.asarray(fails[row, k]).ravel() if len(row) else np.zeros(0, int))
    width = [np.pad(p, ((0, 0), (0, 3 - p.shape[1])), constant_values=-1) for p in parts]
    return Conjunctions(*(np.concatenate(v).astype(np.int64) for v in (width, counts, hits)))


def _pairs(left, right, ones: np.ndarray, least: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``i < j`` and the number of items that have both, of all pairs that enough have."""
    both = (left.T @ right).tocoo()
    keep = (both.row < both.col) & (both.data >= least)
    i, j, n = both.row[keep], both.col[keep], both.data[keep]
    order = np.lexsort((j, i))
    return i[order], j[order], n[order]


def holding(concepts: Concepts, found: Conjunctions):
    """``csc_matrix (n, S) bool``: of which items each conjunction holds."""
    from scipy.sparse import csc_matrix

    out = None
    for k in range(found.parts.shape[1]):
        at = found.parts[:, k]
        some = concepts.table[:, np.maximum(at, 0)].astype(np.int8)
        if out is None:
            out = some
            continue
        used = at >= 0
        # a place without a concept keeps what is there
        both = out.multiply(some).tocsc()
        if used.all():
            out = both
        elif used.any():
            pick = np.where(used, np.arange(len(at)), np.arange(len(at)) + len(at))
            from scipy.sparse import hstack

            out = hstack([both, out]).tocsc()[:, pick]
    return csc_matrix((concepts.n, 0), dtype=bool) if out is None else out.astype(bool).tocsc()


def log_share(count: np.ndarray | float, n: int) -> np.ndarray:
    """Logarithm of a share with add-one smoothing, so that nothing is impossible."""
    return np.log((np.asarray(count, float) + 1) / (n + 2))


def rarity(count: np.ndarray | float, n: int) -> np.ndarray:
    """``-log P``: how unexpected an item is that a situation holds of, which ``count`` of n do."""
    return -log_share(count, n)


def over_represented(both: np.ndarray, x: np.ndarray, y: np.ndarray, n: int) -> np.ndarray:
    """``log p`` of Fisher's exact test, one-sided: at least ``both`` of the x items of one kind are among the y of
    another, where there are n in all. Logarithms, because p is below the smallest number where it is of interest.
    """
    from scipy.special import gammaln

    given = np.broadcast_arrays(both, x, y)
    tables, where = np.unique(np.stack([v.ravel() for v in given], 1), axis=0, return_inverse=True)
    k, x, y = tables.T.astype(float)

    def log_ways(of: np.ndarray | float, some: np.ndarray) -> np.ndarray:
        return gammaln(of + 1.0) - gammaln(some + 1) - gammaln(of - some + 1)

    # the tail away from the mean is summed, whose terms fall: upwards from k above it, downwards from k - 1 below it
    up = k >= x * y / n
    start = np.where(up, k, k - 1)
    possible = (start >= np.maximum(0, x + y - n)) & (start <= np.minimum(x, y))
    at = np.where(possible, start, np.maximum(0, x + y - n))
    log_first = log_ways(y, at) + log_ways(n - y, x - at) - log_ways(n, x)
    term, total, left = np.ones(len(k)), np.ones(len(k)), possible.copy()
    while left.any():
        i, j, u, v = at[left], up[left], x[left], y[left]
        rise = (v - i) * (u - i) / ((i + 1) * (n - v - u + i + 1))
        fall = i * (n - v - u + i) / ((v - i + 1) * (u - i + 1))
        term[left] *= np.where(j, rise, fall)
        total[left] += term[left]
        at[left] += np.where(j, 1, -1)
        left[left] = term[left] > 1e-16 * total[left]
    tail = np.where(possible, log_first + np.log(total), -np.inf)
    with np.errstate(divide="ignore"):
        out = np.where(up, tail, np.log1p(-np.exp(np.minimum(tail, 0))))
    return np.minimum(out, 0.0)[where.ravel()].reshape(given[0].shape)


class Together(NamedTuple):
    """Conjunctions of two or three concepts, and how far their parts explain them."""

    found: Conjunctions
    rarity: np.ndarray  #: ``(S,)``
    #: ``(S,)`` logarithm of how many times as often they occur as their parts explain; of three concepts the smallest
    #: over the three ways to cut them in two, so that a third one counts only for what it adds.
    surprise: np.ndarray
    log_p: np.ndarray  #: ``(S,)`` of the cut that explains most
    q: np.ndarray  #: ``(S,)`` adjusted for all conjunctions of so many concepts that there could be


def together(concepts: Concepts, found: Conjunctions) -> Together:
    """Rarity and surprise of the conjunctions of two and three concepts of different names."""
    name = np.append(np.unique(concepts.names, return_inverse=True)[1], [-1, -2, -3])  # each missing part is its own
    i, j, k = name[np.where(found.parts < 0, [-3, -2, -1], found.parts)].T
    found = found.take(np.flatnonzero((found.parts[:, 1] >= 0) & (i != j) & (i != k) & (j != k)))
    n, table = concepts.n, concepts.table.astype(np.int32)
    single = np.asarray(table.sum(0)).ravel()
    both = (table.T @ table).tocsr()
    three = found.parts[:, 2] >= 0
    surprise, log_p = np.full(len(three), np.inf), np.full(len(three), -np.inf)
    cuts = ((0, 1, 2), (0, 2, 1), (1, 2, 0))  # two of three, and the third
    for a, b, c in cuts:
        i, j, k = (found.parts[:, v] for v in (a, b, c))
        pair = np.asarray(both[np.maximum(i, 0), np.maximum(j, 0)]).ravel() if len(i) else np.zeros(0)
        left = np.where(three, pair, single[np.maximum(found.parts[:, 0], 0)])
        right = single[np.where(three, k, found.parts[:, 1])]
        gain = log_share(found.support, n) - log_share(left, n) - log_share(right, n)
        surprise = np.minimum(surprise, gain)
        log_p = np.maximum(log_p, over_represented(found.support, left, right, n))
    q = np.ones(len(three))
    f = len(concepts.latents)
    for kind, possible in ((~three, f * (f - 1) // 2), (three, f * (f - 1) * (f - 2) // 6)):
        q[kind] = adjusted(np.exp(log_p[kind]), possible)
    return Together(found, rarity(found.support, n), surprise, log_p, q)


def adjusted(p: np.ndarray, possible: int) -> np.ndarray:
    """Benjamini and Hochberg's p values where there are more tests than those whose p is known: the others count as 1,
    since who is not even frequent enough was looked at all the same.
    """
    own = benjamini_hochberg(p)
    return np.minimum(own * max(possible, len(p)) / max(len(p), 1), 1)


def least_items(options: Mining, n: int) -> int:
    """Items that a conjunction has to hold of."""
    return max(options.support, int(np.ceil(options.support_share * n)), 1)


def odd_ones(pairs: Together, mining: Mining) -> np.ndarray:
    """The conjunctions that go together more than chance has it, the most surprising first."""
    clear = np.flatnonzero((pairs.q <= mining.fdr) & (pairs.surprise > 0))
    return clear[np.argsort(-pairs.surprise[clear], kind="stable")][: mining.most]
