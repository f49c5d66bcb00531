"""A bounded folder of files that lie elsewhere: whole ones alone, those that were used last.

Several processes share it. A file has one that brings it, which holds its lock; whoever reads it has it open, so that
it may be removed meanwhile.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO, NamedTuple

from mmsae.errors import InputError
from mmsae.files import cache_folder, free_bytes, nbytes
from mmsae.remote.places import bring
from mmsae.remote.urls import Remote, file_name, shown

SIZE = "MMSAE_CACHE_GB"
DEFAULT_GB = 100.0
MARGIN = 64 << 20
"""Bytes of the disk that are left free."""
PATIENCE = 60.0
"""Seconds that are waited for room which other processes take for files on their way."""


def folder() -> Path:
    """Where the files are."""
    return cache_folder() / "shards"


def bound() -> int:
    """Bytes that the files may take together: ``MMSAE_CACHE_GB``, or 100 GB.

    Raises:
        InputError: The variable is no number.
    """
    given = os.environ.get(SIZE, "")
    try:
        size = float(given or DEFAULT_GB)
    except ValueError:
        size = 0
    if size <= 0:
        raise InputError(f"{SIZE} is {given!r}; it is a number of gigabytes above 0")
    return round(size * 1e9)


def check_room(remotes: Iterable[Remote]) -> None:
    """Refuse files of which the largest would never fit, before any work.

    Raises:
        InputError: Names the file, its size, and what there is.
    """
    missing = [r for r in remotes if not _is_whole(_path(r), r)]
    if not missing:
        return
    largest = max(missing, key=lambda r: r.size)
    if largest.size > bound():
        raise InputError(
            f"{shown(largest.url)} has {nbytes(largest.size)}, and the cache {folder()} may hold {nbytes(bound())}: "
            f"set {SIZE} to more"
        )
    if largest.size + MARGIN > (room := free_bytes(folder()) + sum(e.size for e in _entries())):
        raise _no_room(largest, room)


def cached(remote: Remote) -> BinaryIO:
    """The file, open for reading; brought here first where it is not.

    Raises:
        InputError: It cannot be brought here, or there is no room for it.
    """
    from filelock import FileLock

    path = _path(remote)
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with FileLock(_lock(path)):
            if not _is_whole(path, remote):
                part = _make_room(remote, path)
                try:
                    bring(remote, part)
                    os.replace(part, path)
                finally:
                    part.unlink(missing_ok=True)
            with suppress(FileNotFoundError):  # another process made room just now
                file = open(path, "rb")
                with suppress(OSError):
                    os.utime(path)
                return file


class _Entry(NamedTuple):
    used: float
    size: int
    path: Path


def _entries() -> list[_Entry]:
    """The whole files, the one that was used longest ago first."""
    found = []
    for path in folder().glob("*"):
        with suppress(OSError):
            if path.is_file() and path.suffix != ".part" and path.name != "room.lock":
                stat = path.stat()
                found.append(_Entry(stat.st_mtime, stat.st_size, path))
    return sorted(found)


def _make_room(remote: Remote, path: Path) -> Path:
    """The path of a file on its way, whose name says how much room it takes; what was used longest ago goes for it."""
    from filelock import FileLock

    part, until = path.with_name(f"{path.name}.{remote.size}.part"), time.monotonic() + PATIENCE
    while True:
        with FileLock(str(folder() / "room.lock")):
            on_the_way = _on_the_way(path)
            if _freed(remote.size, on_the_way):
                part.touch()
                return part
        if not on_the_way or time.monotonic() > until:
            raise _no_room(remote, free_bytes(folder()))
        time.sleep(0.5)


def _freed(size: int, on_the_way: int) -> bool:
    """Whether there is room now, after what can go has gone."""
    entries, limit = _entries(), bound()
    held = sum(e.size for e in entries)
    while True:
        if held + on_the_way + size <= limit and free_bytes(folder()) - on_the_way >= size + MARGIN:
            return True
        if not entries:
            return False
        oldest = entries.pop(0)
        oldest.path.unlink(missing_ok=True)
        held -= oldest.size


def _on_the_way(own: Path) -> int:
    """Bytes that files of other processes will still take; what killed ones left is removed."""
    from filelock import FileLock, Timeout

    total = 0
    for part in folder().glob("*.part"):
        path = part.with_name(part.name.rsplit(".", 2)[0])
        if path == own:
            part.unlink(missing_ok=True)
            continue
        try:
            with FileLock(_lock(path), timeout=0):
                part.unlink(missing_ok=True)
        except Timeout:
            with suppress(OSError):
                total += max(0, int(part.name.rsplit(".", 2)[1]) - part.stat().st_size)
    return total


def _no_room(remote: Remote, room: int) -> InputError:
    return InputError(
        f"{folder()}: {shown(remote.url)} needs {nbytes(remote.size + MARGIN)} and {nbytes(room)} can be made free; "
        "make room, or name a larger disk with MMSAE_CACHE"
    )


def _path(remote: Remote) -> Path:
    known = "\0".join(map(str, remote)).encode()
    name = file_name(remote.url)[-60:]
    return folder() / f"{blake2b(known, digest_size=16).hexdigest()}-{name}"


def _lock(path: Path) -> str:
    """The lock of a file, which it shares with few others: there are 4,096 in all, and they stay."""
    locks = folder() / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    return str(locks / path.name[:3])


def _is_whole(path: Path, remote: Remote) -> bool:
    try:
        return path.stat().st_size == remote.size
    except OSError:
        return False
