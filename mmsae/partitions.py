"""Sorting, searching and matching records that memory does not hold: files partitioned by leading bits.

A record is a row of uint64 words, the most significant first; numbers become words by :func:`order_key`, uids by
:func:`mmsae.shards.uids.uid_words`. Records come from a *source*, a function that gives them in blocks, each time anew.
A pass over it counts 16 leading bits; where there are more records than :data:`ROWS`, another writes them into files of
neighbouring counts, each of which is sorted in memory, or partitioned by its next bits if it is still too large. So
memory is the same for a million records and a billion, and for any distribution: equal leading bits cost further
passes, never memory.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from mmsae.files import disk_errors

ROWS = 1 << 18
"""Records that are sorted in memory at once, and that a source should give in a block."""
FILES = 256  #: That records are partitioned into, about; more rows than FILES * ROWS are partitioned twice.
_BITS = 16
_BINS = 1 << _BITS

Source = Callable[[], Iterator[np.ndarray]]
"""Gives ``(n, words)`` uint64 blocks, the same whenever it is called."""


def order_key(values: np.ndarray) -> np.ndarray:
    """Unsigned integers of the same width in the same order as floats or signed integers that are not NaN."""
    size = values.dtype.itemsize * 8
    unsigned, top = np.dtype(f"u{size // 8}"), np.array(1 << (size - 1), f"u{size // 8}")
    bits = np.ascontiguousarray(values).view(unsigned)
    if values.dtype.kind == "f":
        return np.where(bits & top, ~bits, bits | top)
    return bits ^ top


def from_order_key(keys: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The numbers that :func:`order_key` turned into these."""
    top = np.array(1 << (keys.dtype.itemsize * 8 - 1), keys.dtype)
    if dtype.kind == "f":
        return np.where(keys & top, keys ^ top, ~keys).view(dtype)
    return (keys ^ top).view(dtype)


def read_records(path: Path, words: int) -> Iterator[np.ndarray]:
    """The records of a file, in blocks."""
    with open(path, "rb") as file:
        while len(block := np.fromfile(file, np.uint64, ROWS * words)):
            yield block.reshape(-1, words)


def ascending(source: Source, words: int, folder: Path, digit: int = 0) -> Iterator[np.ndarray]:
    """All records of a source in ascending order, in blocks.

    Args:
        source: The records.
        words: Words of a record.
        folder: Where temporary files go; as large as the records together, gone when the last block was given.
        digit: Number of 16-bit digits that are known to be equal.

    Raises:
        InputError: The disk is full.
    """
    if digit == words * 64 // _BITS:
        yield from source()
        return
    counts, held, n = np.zeros(_BINS, np.int64), [], 0
    for block in source():
        counts += np.bincount(_digit(block, digit), minlength=_BINS)
        n += len(block)
        if n <= ROWS:
            held.append(block)
        else:
            held.clear()
    if n <= ROWS:
        if n:
            yield _sorted(np.concatenate(held))
        return
    if counts.max() == n:
        yield from ascending(source, words, folder, digit + 1)
        return
    with tempfile.TemporaryDirectory(prefix=".sort-", suffix=".tmp", dir=folder) as own:
        for file in _partition(source, digit, counts, Path(own)):
            yield from ascending(partial(read_records, file, words), words, folder, digit)
            file.unlink()


def _digit(block: np.ndarray, digit: int) -> np.ndarray:
    word, place = divmod(digit, 64 // _BITS)
    return (block[:, word] >> np.uint64(64 - _BITS * (place + 1)) & np.uint64(_BINS - 1)).astype(np.int64)


def _sorted(block: np.ndarray) -> np.ndarray:
    return block[np.lexsort(block.T[::-1])]


def _partition(source: Source, digit: int, counts: np.ndarray, folder: Path) -> list[Path]:
    """Files of records with neighbouring digits, in their order; a digit of many records has a file of its own."""
    target = max(ROWS // 2, -(-int(counts.sum()) // FILES))
    large = counts > target
    after = np.concatenate([[False], large[:-1]])
    label = (counts.cumsum() - counts) // target + (large | after).cumsum()
    part = np.unique(label, return_inverse=True)[1]
    files = {int(p): folder / f"{p:05d}" for p in np.unique(part[counts > 0])}
    with disk_errors(folder):
        for block in _full(source()):
            own = part[_digit(block, digit)]
            order = np.argsort(own, kind="stable")
            block, own = block[order], own[order]
            some, at = np.unique(own, return_index=True)
            for p, lo, hi in zip(some.tolist(), at, [*at[1:], len(own)], strict=True):
                with open(files[p], "ab") as file:
                    block[lo:hi].tofile(file)
    return list(files.values())


def _full(blocks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """The same records in blocks of at least :data:`ROWS`, for sources that give few at a time."""
    held, n = [], 0
    for block in blocks:
        held.append(block)
        n += len(block)
        if n >= ROWS:
            yield np.concatenate(held)
            held, n = [], 0
    if n:
        yield np.concatenate(held)


def nth(source: Source, words: int, n: int) -> np.ndarray:
    """The n-th smallest record (from 0): one pass counts leading bits, another sorts those that share the n-th one's.

    Where these are more than :data:`ROWS`, further passes count their next bits.
    """
    prefix: list[int] = []
    while True:
        counts = np.zeros(_BINS, np.int64)
        for block in _with(source, prefix):
            counts += np.bincount(_digit(block, len(prefix)), minlength=_BINS)
        at = int(np.searchsorted(counts.cumsum(), n, side="right"))
        n -= int(counts[:at].sum())
        prefix.append(at)
        whole = len(prefix) == words * 64 // _BITS
        if counts[at] <= ROWS or whole:
            found = _with(source, prefix)
            return next(found)[0] if whole else _sorted(np.concatenate(list(found)))[n]


def _with(source: Source, prefix: list[int]) -> Iterator[np.ndarray]:
    """The records that begin with some digits."""
    for block in source():
        here = np.ones(len(block), bool)
        for i, digit in enumerate(prefix):
            here &= _digit(block, i) == digit
        if here.any():
            yield block[here]


def order_statistics(source: Callable[[], Iterator[np.ndarray]], ranks: np.ndarray) -> np.ndarray:
    """The numbers at some ranks (from 0) of those that a source gives in blocks of one type, exactly.

    Two passes for 32-bit numbers: one counts their upper bits, the other the lower bits of those that share the upper
    bits with a number that is asked for. Memory is half a megabyte a rank.
    """
    left, dtype = np.array(ranks, np.int64), next(iter(source())).dtype
    size = dtype.itemsize * 8
    found = np.zeros(len(left), np.uint64)
    for shift in range(size - _BITS, -1, -_BITS):
        counts = {p: np.zeros(_BINS, np.int64) for p in set(found.tolist())}
        for block in source():
            keys = order_key(block).astype(np.uint64)
            for p, count in counts.items():
                here = keys if shift + _BITS == size else keys[keys >> np.uint64(shift + _BITS) == p]
                digits = (here >> np.uint64(shift) & np.uint64(_BINS - 1)).astype(np.int64)
                count += np.bincount(digits, minlength=_BINS)
        for i, p in enumerate(found.tolist()):
            upto = counts[p].cumsum()
            at = int(np.searchsorted(upto, left[i], side="right"))
            left[i] -= upto[at] - counts[p][at]
            found[i] = p << _BITS | at
    return from_order_key(found.astype(f"u{dtype.itemsize}"), dtype)


def repeated(uids: Source, folder: Path) -> Iterator[np.ndarray]:
    """``(m, 2)`` pairs of a row and the first row with the same uid, in blocks that ascend by row.

    Args:
        uids: Their ``(n, 2)`` words, in the order of the rows.
        folder: Where temporary files go.
    """

    def numbered() -> Iterator[np.ndarray]:
        at = 0
        for block in uids():
            yield np.column_stack([block, np.arange(at, at + len(block), dtype=np.uint64)])
            at += len(block)

    with tempfile.TemporaryDirectory(prefix=".uids-", suffix=".tmp", dir=folder) as own:
        pairs = Path(own) / "pairs"
        with disk_errors(folder), open(pairs, "wb") as file:
            for found in _later(ascending(numbered, 3, Path(own))):
                found.tofile(file)
        yield from ascending(partial(read_records, pairs, 2), 2, Path(own))


def _later(records: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """Of ascending ``(uid, uid, row)`` those whose uid came before, as ``(row, first row)``."""
    last = np.zeros((0, 3), np.uint64)
    for block in records:
        block = np.concatenate([last, block])
        new = np.ones(len(block), bool)
        new[1:] = (block[1:, :2] != block[:-1, :2]).any(1)
        first = np.maximum.accumulate(np.where(new, np.arange(len(block)), 0))
        yield np.column_stack([block[~new, 2], block[first[~new], 2]])
        last = block[first[-1:]]


def by_part(pairs: Iterator[np.ndarray], starts: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """``(part, its pairs)`` of pairs that ascend by row; part i has rows ``starts[i]`` to ``starts[i + 1]``."""
    held, part = [], -1
    for block in pairs:
        own = np.searchsorted(starts, block[:, 0], side="right") - 1
        for p in np.unique(own).tolist():
            if p != part and held:
                yield part, np.concatenate(held)
                held = []
            part = p
            held.append(block[own == p])
    if held:
        yield part, np.concatenate(held)
