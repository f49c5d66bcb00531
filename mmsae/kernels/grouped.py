"""Exact selection on the CPU: what cannot be among the largest is left out before anything is ranked.

The k-th largest of the maxima of groups of entries is a bound that at least k entries of the row reach. Few more reach
it, and only those are ranked: a pass for the maxima, one for the comparison, and work on a few per cent of the entries.
NumPy does it, whose comparison, partition and search for true entries are vectorised (torch's top-k takes two to three
times as long). Ids ascend, and of equal entries the first ones are taken: what is chosen, and every sum over it,
depends on the entries alone, and not on how they were found.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmsae.kernels.ids import distinct

LEAST = 1024  # columns, and four for each that is chosen: with fewer nothing is won
THREADS = 6  # with more of them torch's top-k, which uses them all, is as fast
SLACK = 4  # rows of which more than so many times k entries reach the bound have equal entries: they are ranked whole
DENSE = 0.105  # NumPy finds true entries by a faster way where more than a tenth are true


def pays(device: torch.device, width: int, k: int = 1) -> bool:
    """Whether these functions choose k of so many entries faster than torch's own do."""
    return device.type == "cpu" and width >= max(LEAST, 4 * k)


def topk(matrix: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """``(values, ids)``, both ``(N, k)``, of the k largest of each row of ``matrix (N, F)`` on the CPU.

    Ids ascend; of entries that are equal the first are chosen. NaN counts as infinity.
    """
    n, width = matrix.shape
    a = _numpy(matrix)
    places = (_screened if width >= 4 * k and torch.get_num_threads() <= THREADS else _ranked)(a, k)
    values = matrix.detach().reshape(-1).index_select(0, torch.from_numpy(places)).view(n, k)
    return values, torch.from_numpy(places.reshape(n, k) - np.arange(n)[:, None] * width)


def marked(matrix: Tensor, k: int) -> Tensor:
    """``(N, F)`` 1 for the k largest of each row of ``matrix (N, F)`` on the CPU, 0 for the others, in its precision.

    Of entries that are equal the first are chosen.
    """
    a = _numpy(matrix)
    n, width = a.shape
    cut = np.partition(a, width - k, axis=1)[:, width - k, None]
    on = a >= cut
    if np.count_nonzero(on) > n * k:
        places = np.flatnonzero(on)
        count = rows_of(places, n, width)[1]
        cut = np.repeat(cut, count)
        on.reshape(-1)[places] = chosen(a.reshape(-1).take(places), cut, count, k)
    return torch.from_numpy(on).to(matrix.dtype)


def above(scores: Tensor, threshold: Tensor, least: int = 1, inclusive: bool = False) -> tuple[Tensor, Tensor]:
    """``(ids, whether they count)``, both ``(N, K)``, of the entries of ``scores (N, F)`` above a threshold on the CPU.

    ``threshold`` is one number or ``(F,)``; with ``inclusive`` entries that are equal to it count too. K is the most
    that a row has, and at least ``least`` (at most F). Ids that count ascend and come first; the others are such as the
    row has not.
    """
    n, width = scores.shape
    compare = np.greater_equal if inclusive else np.greater
    return padded(np.flatnonzero(compare(_numpy(scores), _numpy(threshold.reshape(-1)))), n, width, least)


class Largest(NamedTuple):
    """What a batch keeps of its entries; K is the most that a row has, and at least 1."""

    values: Tensor  #: ``(N, K)`` entries, before they were scored.
    indices: (
        Tensor  #: ``(N, K)`` int64 ids; those that count ascend and come first, the others are such as the row has not.
    )
    kept: Tensor  #: ``(N, K)`` bool: whether they count.
    least: Tensor  #: ``(1,)`` the smallest score that was kept, infinite where none was.


Found = tuple[np.ndarray, np.ndarray, np.ndarray, float]
"""``(ascending places, scores, entries, bound)`` of scores that reach a bound, or are positive where it is 0."""


def largest(reaching: Callable[[float], Found], n: int, width: int, budget: int) -> Largest:
    """The ``budget`` largest positive scores of an ``(N, F)`` matrix that is made part by part, on the CPU.

    Should a whole batch have too few above a bound, all is done again with a lower one. Of equal scores the first are
    kept.

    Args:
        reaching: What reaches a bound that the first part has for so many times its share of the budget.
        n: N, at least 1.
        width: F.
        budget: Scores that are kept; all positive ones where there are fewer.
    """
    for slack in (1.25, 5.0, math.inf):
        places, scored, kept, bound = reaching(slack)
        if bound <= 0 or len(places) >= budget:
            break
    if not budget:
        places, scored, kept = places[:0], scored[:0], kept[:0]
    elif len(places) > budget:
        cut = np.partition(scored, len(places) - budget)[len(places) - budget]
        on = chosen(scored, np.broadcast_to(cut, scored.shape), np.array([len(places)]), budget)
        places, scored, kept = places[on], scored[on], kept[on]
    ids, on = padded(places, n, width)
    values = np.zeros(ids.shape, dtype=kept.dtype)
    values[on.numpy()] = kept
    return Largest(torch.from_numpy(values), ids, on, torch.from_numpy(scored.min(initial=np.inf, keepdims=True)))


def reaching(parts: Iterable[tuple[Tensor, Tensor]], n: int, budget: int, slack: float) -> Found:
    """What :func:`largest` asks, of ``(entries, scores)`` of some of n rows after the others."""
    found, at, bound = [], 0, None
    for entries, scores in parts:
        a = _numpy(scores)
        if bound is None:
            size = max(1, a.shape[1] // 512)
            maxima = a[:, : a.shape[1] // size * size].reshape(len(a), size, -1).max(1)
            bound = reached(maxima, share(budget, len(a), n, slack), a.size)
        places = np.flatnonzero((a >= bound) if bound > 0 else (a > 0))
        found.append((places + at, a.reshape(-1).take(places), _numpy(entries).reshape(-1).take(places)))
        at += a.size
    return *(np.concatenate(t) for t in zip(*found, strict=True)), bound


def share(budget: int, rows: int, n: int, slack: float) -> float:
    """How many scores of the first rows shall reach a bound for a budget of n rows."""
    return budget * rows / n * (1.0 if rows == n else slack)


def reached(maxima: np.ndarray, rank: float, size: int) -> float:
    """What about ``rank`` of ``size`` scores reach, and not fewer, by the maxima of groups of them.

    It is 0 where that is more than a quarter of them, and where it would not be positive.
    """
    if 4 * rank > size or rank > maxima.size:
        return 0.0
    rank = max(1, math.ceil(rank))
    bound = float(np.partition(maxima.reshape(-1), maxima.size - rank)[maxima.size - rank])
    return bound if bound > 0 else 0.0  # and where it is NaN


def padded(places: np.ndarray, n: int, width: int, least: int = 1) -> tuple[Tensor, Tensor]:
    """``(ids, whether they count)`` of ascending ``places`` in an ``(N, F)`` matrix; see :func:`above`."""
    start, count = rows_of(places, n, width)
    most = min(max(least, int(count.max(initial=0))), width)
    ids = np.zeros((n, most), dtype=np.int64)
    ids.reshape(-1)[slots(start, count, most)] = places - np.repeat(np.arange(n) * width, count)
    on = torch.from_numpy(np.arange(most) < count[:, None])
    return distinct(torch.from_numpy(ids), on), on


def _numpy(t: Tensor) -> np.ndarray:
    """The same numbers in one block, in a precision that NumPy has."""
    t = t.detach()
    return np.ascontiguousarray((t.float() if t.dtype in (torch.bfloat16, torch.float16) else t).numpy())


def rows_of(places: np.ndarray, n: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Where each row begins among ascending places of an ``(N, F)`` matrix, and how many it has."""
    edges = np.searchsorted(places, np.arange(n + 1) * width)
    return edges[:-1], np.diff(edges)


def slots(start: np.ndarray, count: np.ndarray, most: int) -> np.ndarray:
    """Places in an ``(N, most)`` matrix where entries that follow each other row by row fill each row from its left."""
    return np.repeat(np.arange(len(start)) * most - start, count) + np.arange(count.sum())


def _screened(a: np.ndarray, k: int) -> np.ndarray:
    """``(N * k,)`` ascending places of the k largest of each row, found by a bound; F is at least 4k."""
    n, width = a.shape
    groups = min(max(128, 2 * k, min(4 * k, 512)), width // 2)
    size = width // groups
    rank = k
    if DENSE / 2 < k / width < DENSE:
        rank = max(k, int(groups * (1 - (1 - DENSE) ** size)))
    maxima = a[:, : size * groups].reshape(n, size, groups).max(1)  # of columns that are so many apart
    bound = np.partition(maxima, groups - rank, axis=1)[:, groups - rank, None]
    places = np.flatnonzero(a >= bound)
    start, count = rows_of(places, n, width)
    odd = (count < k) | (count > SLACK * k + 64)  # NaN, or equal entries
    if odd.any():
        out = np.empty((n, k), dtype=np.int64)
        for rows, find in ((~odd, _screened), (odd, _ranked)):
            if rows.any():
                which = np.flatnonzero(rows)
                out[which] = find(a[which], k).reshape(-1, k) + ((which - np.arange(len(which))) * width)[:, None]
        return out.reshape(-1)
    entries = a.reshape(-1).take(places)
    cut = kth_largest(entries, start, count, k)
    return places.compress(chosen(entries, np.repeat(cut, count), count, k))


def _ranked(a: np.ndarray, k: int) -> np.ndarray:
    """``(N * k,)`` ascending places of the k largest of each row, found by torch's top-k."""
    n, width = a.shape
    best = torch.from_numpy(a).topk(k, dim=1, sorted=False).values
    if best.isnan().any():
        return _ranked(np.where(np.isnan(a), np.inf, a), k)
    cut = best.amin(1).numpy()
    places = np.flatnonzero(a >= cut[:, None])  # and not torch's ids: which of equal entries it takes is not said
    count = rows_of(places, n, width)[1]
    return places.compress(chosen(a.reshape(-1).take(places), np.repeat(cut, count), count, k))


def kth_largest(entries: np.ndarray, start: np.ndarray, count: np.ndarray, k: int) -> np.ndarray:
    """``(N,)`` the k-th largest of each row's entries, which follow each other row by row and are at least k."""
    n, most = len(count), int(count.max(initial=0))
    block = np.full(n * most, -np.inf, dtype=entries.dtype)
    block[slots(start, count, most)] = entries
    return np.partition(block.reshape(n, most), most - k, axis=1)[:, most - k] if n else block


def chosen(entries: np.ndarray, cut: np.ndarray, count: np.ndarray, k: int) -> np.ndarray:
    """Which entries are the k largest of their row, of equal ones the first.

    ``count (N,)`` are the entries of each row, which follow each other row by row, and ``cut``, for every entry, the
    k-th largest of its row.
    """
    on = entries >= cut
    if np.count_nonzero(on) > k * len(count):
        larger, equal = entries > cut, entries == cut
        row = np.repeat(np.arange(len(count)), count)
        free = k - np.bincount(row[larger], minlength=len(count))
        seen = equal.cumsum()
        before = np.concatenate([[0], seen])[count.cumsum() - count]  # in the rows before
        on = larger | (equal & (seen - before[row] <= free[row]))
    return on
