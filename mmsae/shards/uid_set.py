"""Which uids one pass over shards has met, in memory that does not grow with the corpus."""

from __future__ import annotations

import tempfile
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mmsae.files import disk_errors
from mmsae.partitions import ROWS, repeated
from mmsae.shards.uids import hex_uids, taken_already
from mmsae.types import ImageTextBatch, InputError

MOST = 1 << 24
"""Hashes that are held at once, in 256 MiB."""
HELD = 1 << 16
"""Uids that are kept in memory (1.5 MiB) before they go to a file."""
_LEAST = 1 << 13
_WORDS = 3  # upper and lower half of a uid, number of its shard


class Hashes:
    """64-bit hashes in a table with open addressing, the first :data:`MOST` of them.

    The table is at most half full and grows fourfold, so it takes 16 to 64 bytes a hash, 64 KiB at least and 256 MiB at
    most; while it grows, an eighth more.
    """

    def __init__(self) -> None:
        self._build(np.zeros(0, np.uint64))

    def __len__(self) -> int:
        return self._n

    def __contains__(self, value: int) -> bool:
        return self._table[self._slot(value or 1)] != 0

    @property
    def full(self) -> bool:
        """Whether no other hash is taken."""
        return self._n >= MOST

    def add(self, value: int) -> bool:
        """Take a hash in, unless there are :data:`MOST`; whether it was there before."""
        value = value or 1  # 0 is a free place
        at = self._slot(value)
        if self._table[at]:
            return True
        if not self.full:
            if 2 * (self._n + 1) > len(self._table):
                self._build(self._taken())
                at = self._slot(value)
            self._table[at] = value
            self._n += 1
        return False

    def _slot(self, value: int) -> int:
        """Where a hash is, or the free place where it belongs."""
        table, at = self._table, value >> self._shift
        while table[at] not in (0, value):
            at = (at + 1) % len(table)
        return at

    def _taken(self) -> np.ndarray:
        """All hashes, ascending; the table goes."""
        table, self._table = np.frombuffer(self._table, np.uint64), memoryview(b"")
        found = table[table != 0]
        found.sort()
        return found

    def _build(self, hashes: np.ndarray) -> None:
        """A table of these hashes, which ascend, with room for more."""
        size, self._n = _LEAST, len(hashes)
        while 2 * self._n >= size:
            size *= 4
        self._shift, last = 64 - (size.bit_length() - 1), -1
        table = np.zeros(size, np.uint64)
        self._table = memoryview(table)
        for lo in range(0, self._n, ROWS):
            block = hashes[lo : lo + ROWS]
            # each takes the place after that of the one before, or its own where that comes later
            home, steps = (block >> np.uint64(self._shift)).astype(np.int64), np.arange(len(block))
            at = np.maximum.accumulate(np.maximum(home - steps, last + 1)) + steps
            inside, last = at < size, int(at[-1])
            table[at[inside]] = block[inside]
            for value in block[~inside].tolist():  # the last of all: the others are in their places
                self._table[self._slot(value)] = value


class UidSet:
    """The uids of one pass over shards, a context manager; a uid for the second time is refused.

    Up to :data:`MOST` different uids that is so when it comes. After that it still is where a uid equals one of the
    first :data:`MOST`; the others are compared at the end of the context. Memory is that of :class:`Hashes`; the uids
    lie in a file without a name in the folder of temporary files, 24 bytes each (three times that at the end, where
    there are more than :data:`MOST`). A hash that was there is looked up among them: nothing is refused for its hash.
    """

    def __init__(self) -> None:
        self._hashes, self._held, self._file = Hashes(), array("Q"), None
        self._shards: dict[str, int] = {}

    def __enter__(self) -> UidSet:
        return self

    def __exit__(self, kind: type | None, *error: object) -> None:
        try:
            if kind is None and self._hashes.full:
                self._compare()
        finally:
            if self._file is not None:
                self._file.close()

    def add(self, uid: str, shard: str, key: str) -> None:
        """Remember a uid.

        Raises:
            InputError: If it was there already; names the uid, the key and both shards.
        """
        upper, lower = int(uid[:16], 16), int(uid[16:], 16)
        # of Python, as uids may count up; equal uids are told by themselves, so it may differ from process to process
        if self._hashes.add(hash(uid) & 2**64 - 1) and (first := self._first(upper, lower)) is not None:
            raise InputError(taken_already(uid, shard, first, key))
        self._held.extend((upper, lower, self._shards.setdefault(shard, len(self._shards))))
        if len(self._held) >= _WORDS * HELD:
            with disk_errors(tempfile.gettempdir(), then="try again, or let TMPDIR be a folder elsewhere"):
                self._spill()

    def add_batch(self, batch: ImageTextBatch) -> None:
        """Remember the uids of a batch; see :meth:`add`."""
        for row in zip(batch.uids, batch.shards, batch.keys, strict=True):
            self.add(*row)

    def _spill(self) -> None:
        self._file = self._file or tempfile.TemporaryFile()
        self._file.seek(0, 2)
        self._held.tofile(self._file)
        self._file.flush()
        self._held = array("Q")

    def _blocks(self) -> Iterator[np.ndarray]:
        """``(n, 3)`` words of all uids, in the order in which they came."""
        if self._file is not None:
            self._file.seek(0)
            while len(block := np.fromfile(self._file, np.uint64, ROWS * _WORDS)):
                yield block.reshape(-1, _WORDS)
        yield np.array(self._held, np.uint64).reshape(-1, _WORDS)

    def _first(self, upper: int, lower: int) -> str | None:
        """The shard of a uid; None where another uid has the same hash."""
        for block in self._blocks():
            found = np.flatnonzero((block[:, 0] == upper) & (block[:, 1] == lower))
            if len(found):
                return self._shard(block[found[0]])
        return None

    def _shard(self, record: np.ndarray) -> str:
        return list(self._shards)[int(record[2])]

    def _record(self, row: int) -> np.ndarray:
        for block in self._blocks():
            if row < len(block):
                return block[row]
            row -= len(block)
        raise IndexError(row)

    def _compare(self) -> None:
        """Compare all uids.

        Raises:
            InputError: One occurs twice; names it and both shards.
        """
        folder = Path(tempfile.gettempdir())
        for pairs in repeated(lambda: (block[:, :2] for block in self._blocks()), folder):
            later, first = (self._record(row) for row in pairs[0].tolist())
            raise InputError(taken_already(*hex_uids(later[None, :2]), self._shard(later), self._shard(first)))
