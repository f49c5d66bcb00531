"""A small folder that lies on a web server or in an object store, brought here whole by the names of its files."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path

from mmsae.errors import InputError
from mmsae.files import atomic_folder, cache_folder, disk_errors
from mmsae.remote.places import bring, find
from mmsae.remote.urls import file_name


def brought_folder(url: str, names: Sequence[str], optional: Sequence[str] = ()) -> Path:
    """A copy of a folder on this machine, made anew where a file there has changed.

    Args:
        url: Its URL; no web server lists its files.
        names: Files that it must have.
        optional: Files that it may have.

    Raises:
        InputError: One is missing or cannot be read.
    """
    base = url.rstrip("/")
    remotes = find([f"{base}/{name}" for name in names])
    for name in optional:
        with suppress(InputError):
            remotes += find([f"{base}/{name}"])
    known = blake2b("\0".join(map(str, sum(remotes, ()))).encode(), digest_size=16).hexdigest()
    folder = cache_folder() / "folders" / f"{known}-{file_name(base)[-40:]}"
    if not folder.is_dir():
        from filelock import FileLock

        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(str(folder) + ".lock"), disk_errors(folder):
            if not folder.is_dir():
                with atomic_folder(folder) as temp:
                    for remote in remotes:
                        bring(remote, temp / file_name(remote.url))
    return folder
