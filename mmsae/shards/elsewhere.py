"""Which shards a pattern names that lie elsewhere: in object stores, on web servers, on hubs, or behind a command."""

from __future__ import annotations

import io
from collections.abc import Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING

from mmsae.remote.urls import Remote, file_name, scheme_of, shown
from mmsae.shards import table
from mmsae.shards.shard import SUFFIXES, TABLES, TARS, Found, Shard
from mmsae.types import InputError

if TYPE_CHECKING:
    import pyarrow.parquet as pq

FOOTER = 256 << 10
"""Bytes that are asked for in the hope that the footer of a table is among them."""


def remote_shards(pattern: str, options: dict[str, str]) -> list[Shard]:
    """The files that a URL names, with braces, globs (not on web servers), or a folder; see ``expand``.

    Of a folder all tars, else all tables; of a data set of the hub those of the folders below too. Each file is asked
    for its size and version, nothing else is read.

    Raises:
        InputError: Nothing is there, it cannot be read, or its largest file would not fit into the cache.
    """
    names = _braces(pattern)
    if scheme_of(pattern) == "pipe":
        return [_piped(name) for name in names]
    from mmsae.remote import places
    from mmsae.remote.cache import check_room

    single = [n for n in names if _is_file(n)]
    found = dict(zip(single, ([r] for r in places.find(single)), strict=True))
    for name in names:
        if name not in found:
            found[name] = _several(name, places.listed(name, deep=scheme_of(name) == "hf" and not _magic(name)))
    remotes = [r for name in names for r in found[name]]
    check_room(remotes)
    return [_shard(r, options) for r in remotes]


def remote_footer(shard: Shard) -> pq.FileMetaData | None:
    """The footer of a table that lies elsewhere, read alone; None where that cannot be."""
    from mmsae.remote.places import tail

    remote, n = shard.remote, FOOTER
    while (data := tail(remote, n)) is not None:
        if len(data) < 8 or data[-4:] != b"PAR1":
            return None
        if (needed := int.from_bytes(data[-8:-4], "little") + 8) <= len(data):
            return table.read_footer(_Tail(remote.size, data))
        if needed > remote.size or needed <= n:
            return None
        n = needed
    return None


def _several(name: str, listed: Sequence[Remote]) -> list[Remote]:
    """The tars among the files of a folder, else its tables; of a glob both.

    Raises:
        InputError: There are none.
    """
    tars = [r for r in listed if file_name(r.url).lower().endswith(TARS)]
    tables = [r for r in listed if file_name(r.url).lower().endswith(TABLES)]
    chosen = sorted(tars + tables) if _magic(name) else tars or tables
    if not chosen:
        such = f", such as {shown(listed[0].url)}" if listed else ""
        raise InputError(
            f"No shard matches {shown(name)}: there are {len(listed)} other files{such}; shards end in "
            f"{', '.join(SUFFIXES)}."
        )
    return chosen


def _shard(remote: Remote, options: dict[str, str]) -> Shard:
    tag = f"{shown(remote.url)} {remote.tag}".strip()
    return Shard(remote.url, remote=remote, found=Found(remote.size, tag), options=options)


def _piped(url: str) -> Shard:
    """A tar that a command writes; its size is not known, and its version is the command's."""
    tag = blake2b(url.encode(), digest_size=8).hexdigest()
    return Shard(url, found=Found(0, f"pipe {tag}"), kind="tar")


def _is_file(name: str) -> bool:
    return not _magic(name) and file_name(name).lower().endswith(SUFFIXES)


def _magic(name: str) -> bool:
    return scheme_of(name) not in ("http", "https") and any(c in name for c in "*?[")


def _braces(pattern: str) -> list[str]:
    if "{" not in pattern:
        return [pattern]
    import braceexpand

    try:
        return list(braceexpand.braceexpand(pattern))
    except braceexpand.UnbalancedBracesError:
        raise InputError(f"The braces of the shard pattern {shown(pattern)} do not balance.") from None


class _Tail(io.RawIOBase):
    """A file of which the end alone is there; before it there are zeros, which a reader of footers may ask for."""

    def __init__(self, size: int, data: bytes) -> None:
        self._size, self._data, self._at = size, data, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, place: int, whence: int = 0) -> int:
        self._at = place + (0, self._at, self._size)[whence]
        return self._at

    def readinto(self, buffer: bytearray | memoryview) -> int:
        start = self._at - (self._size - len(self._data))
        n = max(0, min(len(buffer), self._size - self._at))
        data = (b"\0" * min(n, max(0, -start)) + self._data[max(0, start) :])[:n]
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)
