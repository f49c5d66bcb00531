"""The file of a unit, open for reading, wherever it lies."""

from __future__ import annotations

from typing import BinaryIO

from mmsae.shards.shard import Shard


def opened(shard: Shard) -> BinaryIO:
    """The file of a unit, which the caller closes."""
    return open(shard.file, "rb")
