"""Ids of samples: where they come from, and numbers that are drawn by them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import numpy as np

from mmsae.shards.group import Group
from mmsae.shards.shard import as_shard

if TYPE_CHECKING:
    import pyarrow as pa

DATACOMP = np.dtype("u8,u8")
"""Of DataComp's lists of uids: the halves of 128 bits."""
_NIBBLE = np.full(256, 255, np.uint8)
_NIBBLE[np.frombuffer(b"0123456789abcdef", np.uint8)] = np.arange(16)
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


def uid_text(uids: Sequence[str] | pa.ChunkedArray | pa.Array) -> np.ndarray:
    """``(N, 32)`` uint8 characters of each uid, of a hash of it where it has another number of bytes."""
    import pyarrow as pa

    if not isinstance(uids, (pa.Array, pa.ChunkedArray)):
        uids = pa.array(uids, pa.string())
    chunks = uids.chunks if isinstance(uids, pa.ChunkedArray) else [uids]
    return np.frombuffer(b"".join(map(_characters, chunks)), np.uint8).reshape(-1, 32)


def _characters(chunk: pa.Array) -> bytes:
    if not len(chunk):
        return b""
    offsets = np.frombuffer(chunk.buffers()[1], np.int32)[chunk.offset : chunk.offset + len(chunk) + 1]
    if (np.diff(offsets) == 32).all():
        return chunk.buffers()[2].to_pybytes()[offsets[0] : offsets[-1]]
    data = (u.encode() for u in chunk.to_pylist())
    return b"".join(u if len(u) == 32 else _hashed(u) for u in data)


def uid_words(uids: Sequence[str] | pa.ChunkedArray | pa.Array) -> np.ndarray:
    """``(N, 2)`` uint64: the upper and the lower half of each uid, of a hash of it where it is not 32 hex digits."""
    text = uid_text(uids)
    nibbles = _NIBBLE[text]
    for i in np.flatnonzero((nibbles == 255).any(1)).tolist():
        nibbles[i] = _NIBBLE[np.frombuffer(_hashed(text[i].tobytes()), np.uint8)]
    return (nibbles[:, ::2] << 4 | nibbles[:, 1::2]).view(">u8").astype(np.uint64)


def _hashed(uid: bytes) -> bytes:
    return blake2b(uid, digest_size=16).hexdigest().encode()


def hex_uids(words: np.ndarray) -> list[str]:
    """The uids of ``(N, 2)`` halves."""
    digits = np.ascontiguousarray(words).astype(">u8").tobytes().hex()
    return [digits[i : i + 32] for i in range(0, len(digits), 32)]


def draw(uid: str, seed: int = 0) -> float:
    """A number in [0, 1) that depends on uid and seed only."""
    return int.from_bytes(blake2b(f"{seed}/{uid}".encode(), digest_size=6).digest(), "big") / 2**48


def taken_already(uid: str, shard: str, first: str, key: str = "") -> str:
    """The sentence about a uid for the second time, in ``shard``; ``first`` is the shard that had it before."""
    which = f" of key {key}" if key else ""
    return (
        f"uid {uid}{which} in shard {shard} was already taken by a sample of shard {first}: uids must"
        " differ, remove one of the two samples (extract and filter do so with --duplicates drop)."
    )
