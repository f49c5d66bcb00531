"""Streams out of packed files, which can be read forward alone."""

from __future__ import annotations

import gzip
from typing import BinaryIO

from mmsae.shards.group import ShardCut

GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
KEPT = 4096
"""Bytes behind the place of reading that can be read again: archives look back by less than two blocks of 512."""


def unpacked(file: BinaryIO) -> BinaryIO | Zstandard:
    """What is in a file that is packed with gzip or Zstandard, or the file itself; told apart by content."""
    mark = file.read(4)
    file.seek(0)
    if mark == ZSTD:
        return Zstandard(file)
    return gzip.GzipFile(fileobj=file) if mark[:2] == GZIP else file


class Zstandard:
    """The content of a Zstandard file, frame after frame: reads forward, and back by ``KEPT`` bytes."""

    def __init__(self, file: BinaryIO) -> None:
        import pyarrow as pa

        self._stream = pa.CompressedInputStream(file, "zstd")
        self._kept = b""  # the last bytes that were unpacked
        self._end = 0  # how many were
        self._at = 0  # the place of reading

    def tell(self) -> int:
        """The place of reading."""
        return self._at

    def seek(self, place: int) -> int:
        """Go to a place.

        Raises:
            ValueError: It lies too far behind.
            ShardCut: See :meth:`read`.
        """
        if self._end - place > len(self._kept):
            raise ValueError(f"byte {place} of a packed file is gone: it was read up to {self._end}")
        self._at = min(place, self._end)
        while self._at < place and self.read(min(1 << 20, place - self._at)):
            pass
        return self._at

    def read(self, n: int = -1) -> bytes:
        """The next ``n`` bytes, or all that is left; fewer at the end alone.

        Raises:
            ShardCut: The file ends within a frame, or is damaged.
        """
        behind = self._end - self._at
        again = self._kept[len(self._kept) - behind :] if behind else b""
        again, fresh = again if n < 0 else again[:n], b""
        if n < 0 or len(again) < n:
            try:
                fresh = self._stream.read(None if n < 0 else n - len(again))
            except OSError as e:  # pyarrow has no other error for either
                said = str(e)
                kind = "truncated_shard" if "Truncated" in said else "broken_shard"
                raise ShardCut(kind, f"Zstandard stream: {said}") from e
            self._kept, self._end = (self._kept + fresh[-KEPT:])[-KEPT:], self._end + len(fresh)
        self._at += len(again) + len(fresh)
        return again + fresh
