"""Files that are there whole or not at all, and one clear sentence where the disk is full."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mmsae.types import InputError


def hidden(path: Path) -> Path:
    """The temporary name beside ``path``. It is fixed, so that a killed try is overwritten by the next one."""
    return path.with_name(f".{path.name}.tmp")


@contextmanager
def disk_errors(path: str | Path) -> Iterator[None]:
    """Turns "no space left" and "quota exceeded" inside the block into an ``InputError`` that names ``path``."""
    try:
        yield
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = shutil.disk_usage(next(p for p in Path(path).absolute().parents if p.exists())).free
        raise InputError(f"The disk is full: {path} could not be written ({free / 1e6:.1f} MB are free there).") from e


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Gives a hidden path beside ``path`` to write a file to, and renames that at the end; removes it on any error.

    Folders are made as needed. A path has one writer at a time.

    Raises:
        InputError: If the disk is full.
    """
    path = Path(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield hidden(path)
            with open(hidden(path), "rb") as file:
                os.fsync(file.fileno())
            os.replace(hidden(path), path)
        finally:
            hidden(path).unlink(missing_ok=True)
