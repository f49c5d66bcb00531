"""Uids as numbers: hashes for splits, and the search for duplicates in memory that stays at 8 bytes an item."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmsae.types import InputError

_M1, _M2, _STEP = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB), np.uint64(0x9E3779B97F4A7C15)


def uid_hash(uids: Sequence[str] | pa.ChunkedArray | pa.Array, seed: int = 0) -> np.ndarray:
    """``(N,) uint64`` well-mixed bits of each uid: the same on every machine, whatever else is in the list."""
    if not isinstance(uids, (pa.Array, pa.ChunkedArray)):
        uids = pa.array(uids, pa.string())
    chunks = uids.chunks if isinstance(uids, pa.ChunkedArray) else [uids]
    parts = [_words(c) for c in chunks]
    words = np.concatenate(parts) if parts else np.zeros((0, 4), np.uint64)
    with np.errstate(over="ignore"):
        h = np.full(len(words), seed, np.uint64)
        for column in words.T:  # four columns of eight characters
            h = _mix((h ^ column) + _STEP)
    return h


def _mix(h: np.ndarray) -> np.ndarray:
    # splitmix64's finaliser
    h = (h ^ (h >> np.uint64(30))) * _M1
    h = (h ^ (h >> np.uint64(27))) * _M2
    return h ^ (h >> np.uint64(31))


def _words(chunk: pa.Array) -> np.ndarray:
    offsets = np.frombuffer(chunk.buffers()[1], np.int32)[chunk.offset : chunk.offset + len(chunk) + 1]
    if len(chunk) and (np.diff(offsets) != 32).any():
        # uids that are not 32 hex digits are brought to that form first
        text = "".join(u if len(u.encode()) == 32 else _hex(u) for u in chunk.to_pylist()).encode()
    else:
        text = chunk.buffers()[2].to_pybytes()[offsets[0] : offsets[-1]] if len(chunk) else b""
    return np.frombuffer(text, "<u8").reshape(-1, 4)


def _hex(uid: str) -> str:
    return hashlib.blake2b(uid.encode(), digest_size=16).hexdigest()


def find_duplicate(files: list[Path], labels: list[str]) -> str | None:
    """The first uid that occurs twice in parquet files with columns ``uid`` and ``key``; None if all differ.

    ``labels`` say how to call each file in the sentence that is returned.
    """
    hashes = np.concatenate([uid_hash(pq.read_table(f, columns=["uid"])["uid"]) for f in files])
    hashes.sort()
    twice = np.unique(hashes[1:][hashes[1:] == hashes[:-1]])
    if not len(twice):
        return None
    seen: dict[str, str] = {}
    # only now are the strings looked at: equal hashes need not be equal uids
    for f, label in zip(files, labels, strict=True):
        table = pq.read_table(f, columns=["uid", "key"])
        for i in np.flatnonzero(np.isin(uid_hash(table["uid"]), twice)).tolist():
            uid, where = table["uid"][i].as_py(), f"{label} key {table['key'][i].as_py()!r}"
            if uid in seen:
                return f"uid {uid} occurs twice, in {seen[uid]} and in {where}"
            seen[uid] = where
    return None


class SeenUids:
    """The uids of the parts that are written, as sorted 64-bit hashes; tells early when one occurs again.

    ``files`` is ``{parquet file of a part: what to call it}`` of those that an earlier run finished.
    """

    def __init__(self, files: Mapping[Path, str]) -> None:
        self._files = dict(files)
        hashes = [uid_hash(pq.read_table(f, columns=["uid"])["uid"]) for f in self._files]
        self._hashes = np.sort(np.concatenate([np.zeros(0, np.uint64), *hashes]))

    def add(self, uids: Sequence[str], keys: Sequence[str], file: Path, label: str) -> None:
        """Add the uids of a part that is about to be written to ``file``, which ``label`` calls.

        Raises:
            InputError: One of them occurs twice, in this part or in an earlier one of this process.
        """
        merged = np.concatenate([self._hashes, np.sort(uid_hash(uids))])
        merged.sort(kind="stable")  # two sorted runs: one merge
        if (merged[1:] == merged[:-1]).any():
            with tempfile.TemporaryDirectory() as tmp:
                pq.write_table(pa.table({"uid": uids, "key": keys}), own := Path(tmp) / "part.parquet")
                files = {**self._files, own: label}
                if dup := find_duplicate(list(files), list(files.values())):
                    raise InputError(f"{dup}; uids must differ, remove one of the two samples")
        self._hashes = merged
        self._files[file] = label
