"""Temporary names, and one clear sentence where the disk is full."""

from __future__ import annotations

import errno
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
