"""Work on many short lists that lie one after the other in flat arrays, without a loop over them."""

from __future__ import annotations

import numpy as np


def bisect(start: np.ndarray, values: np.ndarray, segment: np.ndarray, query: np.ndarray, side: str = "left"):
    """Where each query would stand in its segment, whose values ascend: a binary search of all queries at once.

    Args:
        start: ``(s + 1,)`` where segments start in ``values``.
        values: All segments; may be a map, of which only what is compared is read.
        segment: ``(q,)`` segment of each query.
        query: ``(q,)`` what to look for.
        side: ``left`` or ``right`` of equal values.

    Returns:
        ``(q,) int64`` places in ``values``.
    """
    segment = np.asarray(segment)
    low, high = np.asarray(start)[segment].astype(np.int64), np.asarray(start)[segment + 1].astype(np.int64)
    last = max(len(values) - 1, 0)
    while len(values) and (ajar := low < high).any():
        middle = (low + high) // 2
        found = values[np.minimum(middle, last)]
        right = (found < query) if side == "left" else (found <= query)
        low, high = np.where(ajar & right, middle + 1, low), np.where(ajar & ~right, middle, high)
    return low


def ranges(first: np.ndarray, size: np.ndarray) -> np.ndarray:
    """``first[0], ..., first[0] + size[0] - 1, first[1], ...``."""
    size = np.asarray(size, np.int64)
    ends = np.cumsum(size)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(np.asarray(first, np.int64) - (ends - size), size)


def starts(size: np.ndarray) -> np.ndarray:
    """``(s + 1,) int64`` where segments of these sizes start."""
    return np.concatenate([[0], np.cumsum(size, dtype=np.int64)])


def best_of_rows(matrix, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k largest positive entries of every row of a CSR matrix, best first.

    Returns:
        ``(column, value)``, both ``(rows, k)``; column -1 where a row has fewer. Equal values go by column.
    """
    rows = matrix.shape[0]
    row = np.repeat(np.arange(rows), np.diff(matrix.indptr))
    keep = (matrix.data > 0) & (matrix.data >= _bounds(matrix, k)[row])  # few are left to sort
    row, column, value = row[keep], matrix.indices[keep], matrix.data[keep]
    order = np.lexsort((column, -value, row))
    row, column, value = row[order], column[order], value[order]
    place = np.arange(len(row)) - np.searchsorted(row, row)
    first = place < k
    columns, values = np.full((rows, k), -1, np.int32), np.zeros((rows, k), np.float32)
    columns[row[first], place[first]], values[row[first], place[first]] = column[first], value[first]
    return columns, values


def _bounds(matrix, k: int) -> np.ndarray:
    """What the k-th largest entry of every row is at least: of a row in k parts, the least of the parts' largest."""
    size = np.diff(matrix.indptr).astype(np.int64)
    long = np.flatnonzero(size >= k)
    out = np.full(len(size), -np.inf)
    if k and len(long):
        cuts = matrix.indptr[long, None] + size[long, None] * np.arange(k) // k
        ends = matrix.indptr[long + 1]
        at = np.concatenate([cuts, ends[:, None]], 1).ravel()
        last = np.maximum.reduceat(matrix.data, np.minimum(at, len(matrix.data) - 1))
        out[long] = last.reshape(len(long), k + 1)[:, :k].min(1)
    return out
