"""Temporary names."""

from __future__ import annotations

from pathlib import Path


def hidden(path: Path) -> Path:
    """The temporary name beside ``path``. It is fixed, so that a killed try is overwritten by the next one."""
    return path.with_name(f".{path.name}.tmp")
