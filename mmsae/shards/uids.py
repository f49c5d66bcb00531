"""Ids of samples: where they come from, numbers that are drawn by them, and that they differ."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any

from mmsae.shards.faults import FaultLog
from mmsae.shards.group import Group
from mmsae.shards.shard import as_shard
from mmsae.types import ImageTextBatch, InputError

_HEX32 = re.compile(r"[0-9a-fA-F]{32}")


def make_uid(source: str, shard: str, key: str, meta: Mapping[str, Any]) -> str:
    """The id of a sample: ``meta["uid"]`` if that is 32 hex digits (DataComp's form), else a hash of where it lies.

    ``shard`` is the name of the tar, table or folder (``Shard.base``), without its folder where the name alone says
    which it is: moving a data set does not change its uids.
    """
    uid = meta.get("uid")
    if isinstance(uid, str) and _HEX32.fullmatch(uid):
        return uid.lower()
    return blake2b("\0".join((source, shard, key)).encode(), digest_size=16).hexdigest()


def group_uid(path: str, group: Group, meta: Mapping[str, Any], source: str = "") -> str:
    """The id of an undecoded sample of a unit, whose json is ``meta``; see ``make_uid``."""
    return make_uid(source, as_shard(path).base, group.identified or group.key, meta)


def draw(uid: str, seed: int = 0) -> float:
    """A number in [0, 1) that depends on uid and seed only."""
    return int.from_bytes(blake2b(f"{seed}/{uid}".encode(), digest_size=6).digest(), "big") / 2**48


class UidSet:
    """The uids of one job; a uid for the second time is refused (about 150 bytes of memory a uid)."""

    def __init__(self) -> None:
        self._shard_of: dict[bytes, int] = {}
        self._shards: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._shard_of)

    def __contains__(self, uid: str) -> bool:
        return bytes.fromhex(uid) in self._shard_of

    def add(self, uid: str, shard: str, key: str) -> None:
        """Remember a uid.

        Raises:
            InputError: If it was there already; names the uid, the key and both shards.
        """
        if (first := self.take(uid, shard)) is not None:
            raise InputError(
                f"uid {uid} of key {key} in shard {shard} was already taken by a sample of shard {first}: uids must"
                " differ, remove one of the two samples (extract and filter do so with --duplicates drop)."
            )

    def take(self, uid: str, shard: str) -> str | None:
        """Remember a uid; the name of the shard that has it already, or None where it is new."""
        n = len(self._shard_of)
        first = self._shard_of.setdefault(bytes.fromhex(uid), self._shards.setdefault(shard, len(self._shards)))
        return list(self._shards)[first] if len(self._shard_of) == n else None

    def new(self, uids: Sequence[str], keys: Sequence[str], shards: Sequence[str], log: FaultLog) -> list[bool]:
        """Which of some samples have a uid that is new; the others are counted as ``duplicate``."""
        first = [self.take(*row) for row in zip(uids, shards, strict=True)]
        for uid, key, shard, taken in zip(uids, keys, shards, first, strict=True):
            if taken is not None:
                log.add("duplicate", shard, key, f"uid {uid} is in {taken} already")
        return [taken is None for taken in first]

    def add_batch(self, batch: ImageTextBatch) -> None:
        """Remember the uids of a batch; see :meth:`add`."""
        for row in zip(batch.uids, batch.shards, batch.keys, strict=True):
            self.add(*row)
