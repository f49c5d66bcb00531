"""The file of a unit, open for reading, wherever it lies."""

from __future__ import annotations

from typing import BinaryIO

from mmsae.remote.urls import PIPE
from mmsae.shards.shard import Shard


def opened(shard: Shard) -> BinaryIO:
    """The file of a unit, which the caller closes. One that lies elsewhere is brought to the cache, whole, before.

    Raises:
        InputError: It cannot be brought, or has changed since it was listed.
    """
    if shard.remote is not None:
        from mmsae.remote.cache import cached

        return cached(shard.remote)
    if shard.file.startswith(PIPE):
        from mmsae.remote.pipe import piped

        return piped(shard.file)
    return open(shard.file, "rb")
