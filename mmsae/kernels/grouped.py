"""Exact selection on the CPU: what cannot be among the largest is left out before anything is ranked.

The k-th largest of the maxima of groups of entries is a bound that at least k entries of the row reach. Few more reach
it, and only those are ranked: a pass for the maxima, one for the comparison, and work on a few per cent of the entries.
NumPy does it, whose comparison, partition and search for true entries are vectorised (torch's top-k takes two to three
times as long). Ids ascend, and of equal entries the first ones are taken: what is chosen, and every sum over it,
depends on the entries alone, and not on how they were found.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
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
        count = _rows(places, n, width)[1]
        cut = np.repeat(cut, count)
        on.reshape(-1)[places] = _largest(a.reshape(-1).take(places), cut, count, k)
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


def largest(parts: Callable[[], Iterator[tuple[Tensor, Tensor]]], n: int, width: int, budget: int) -> Largest:
    """The ``budget`` largest positive scores of an ``(N, F)`` matrix that is made part by part, on the CPU.

    A bound is taken from the first part, for somewhat more than its share. Should a whole batch have too few above it,
    all is done again with a lower one. Of equal scores the first are kept.

    Args:
        parts: Makes ``(entries, scores)`` of some rows after the others, anew each time it is called.
        n: N, at least 1.
        width: F.
        budget: Scores that are kept; all positive ones where there are fewer.
    """
    for slack in (1.25, 5.0, torch.inf):
        found, at, bound = [], 0, None
        for entries, scores in parts():
            a = _numpy(scores)
            if bound is None:
                bound = _bound(a, budget * len(a) / n * (1.0 if len(a) == n else slack))
            places = np.flatnonzero((a >= bound) if bound > 0 else (a > 0))
            found.append((places + at, a.reshape(-1).take(places), _numpy(entries).reshape(-1).take(places)))
            at += a.size
        places, scored, kept = (np.concatenate(t) for t in zip(*found, strict=True))
        if bound <= 0 or len(places) >= budget:
            break
    if not budget:
        places, scored, kept = places[:0], scored[:0], kept[:0]
    elif len(places) > budget:
        cut = np.partition(scored, len(places) - budget)[len(places) - budget]
        on = _largest(scored, np.broadcast_to(cut, scored.shape), np.array([len(places)]), budget)
        places, scored, kept = places[on], scored[on], kept[on]
    ids, on = padded(places, n, width)
    values = torch.zeros(ids.shape, dtype=entries.dtype)
    values[on] = torch.from_numpy(kept).to(entries.dtype)
    return Largest(values, ids, on, torch.from_numpy(scored.min(initial=np.inf, keepdims=True)))


def _bound(a: np.ndarray, rank: float) -> float:
    """What about ``rank`` entries of ``a (n, F)`` reach, and not fewer; 0 where that is more than a quarter of them."""
    n, width = a.shape
    size = max(1, width // 512)
    maxima = a[:, : width // size * size].reshape(n, size, -1).max(1).reshape(-1)
    if 4 * rank > a.size or rank > maxima.size:
        return 0.0
    rank = max(1, math.ceil(rank))
    bound = np.partition(maxima, maxima.size - rank)[maxima.size - rank]
    return float(bound) if bound > 0 else 0.0  # and where it is NaN


def padded(places: np.ndarray, n: int, width: int, least: int = 1) -> tuple[Tensor, Tensor]:
    """``(ids, whether they count)`` of ascending ``places`` in an ``(N, F)`` matrix; see :func:`above`."""
    start, count = _rows(places, n, width)
    most = min(max(least, int(count.max(initial=0))), width)
    ids = np.zeros((n, most), dtype=np.int64)
    ids.reshape(-1)[_slots(start, count, most)] = places - np.repeat(np.arange(n) * width, count)
    on = torch.from_numpy(np.arange(most) < count[:, None])
    return distinct(torch.from_numpy(ids), on), on


def _numpy(t: Tensor) -> np.ndarray:
    """The same numbers in one block, in a precision that NumPy has."""
    t = t.detach()
    return np.ascontiguousarray((t.float() if t.dtype in (torch.bfloat16, torch.float16) else t).numpy())


def _rows(places: np.ndarray, n: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Where each row begins among ascending places of an ``(N, F)`` matrix, and how many it has."""
    edges = np.searchsorted(places, np.arange(n + 1) * width)
    return edges[:-1], np.diff(edges)


def _slots(start: np.ndarray, count: np.ndarray, most: int) -> np.ndarray:
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
    start, count = _rows(places, n, width)
    odd = (count < k) | (count > SLACK * k + 64)  # NaN, or equal entries
    if odd.any():
        out = np.empty((n, k), dtype=np.int64)
        for rows, find in ((~odd, _screened), (odd, _ranked)):
            if rows.any():
                which = np.flatnonzero(rows)
                out[which] = find(a[which], k).reshape(-1, k) + ((which - np.arange(len(which))) * width)[:, None]
        return out.reshape(-1)
    most = int(count.max(initial=0))
    entries = a.reshape(-1).take(places)
    block = np.full(n * most, -np.inf, dtype=a.dtype)
    block[_slots(start, count, most)] = entries
    cut = np.partition(block.reshape(n, most), most - k, axis=1)[:, most - k] if n else block
    return _kept(places, entries, np.repeat(cut, count), count, k)


def _ranked(a: np.ndarray, k: int) -> np.ndarray:
    """``(N * k,)`` ascending places of the k largest of each row, found by torch's top-k."""
    n, width = a.shape
    best = torch.from_numpy(a).topk(k, dim=1, sorted=False).values
    if best.isnan().any():
        return _ranked(np.where(np.isnan(a), np.inf, a), k)
    cut = best.amin(1).numpy()
    places = np.flatnonzero(a >= cut[:, None])  # and not torch's ids: which of equal entries it takes is not said
    count = _rows(places, n, width)[1]
    return _kept(places, a.reshape(-1).take(places), np.repeat(cut, count), count, k)


def _kept(places: np.ndarray, entries: np.ndarray, cut: np.ndarray, count: np.ndarray, k: int) -> np.ndarray:
    """Those of ascending places whose entries are the k largest of their row.

    ``count (N,)`` are the places of each row, and ``cut``, for every place, the k-th largest entry of its row.
    """
    return places.compress(_largest(entries, cut, count, k))


def _largest(entries: np.ndarray, cut: np.ndarray, count: np.ndarray, k: int) -> np.ndarray:
    """Which of the entries :func:`_kept` keeps."""
    on = entries >= cut
    if np.count_nonzero(on) > k * len(count):
        larger, equal = entries > cut, entries == cut
        row = np.repeat(np.arange(len(count)), count)
        free = k - np.bincount(row[larger], minlength=len(count))
        seen = equal.cumsum()
        before = np.concatenate([[0], seen])[count.cumsum() - count]  # in the rows before
        on = larger | (equal & (seen - before[row] <= free[row]))
    return on
