"""Uids as numbers: hashes for splits, and for telling early that one occurs twice."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmsae.jobs.duplicates import UidParts
from mmsae.shards.uid_set import Hashes
from mmsae.shards.uids import uid_text
from mmsae.types import InputError

_M1, _M2, _STEP = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB), np.uint64(0x9E3779B97F4A7C15)


def uid_hash(uids: Sequence[str] | pa.ChunkedArray | pa.Array, seed: int = 0) -> np.ndarray:
    """``(N,) uint64`` well-mixed bits of each uid: the same on every machine, whatever else is in the list."""
    words = uid_text(uids).view("<u8").reshape(-1, 4)
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


def find_duplicate(files: Sequence[Path], labels: Sequence[str], folder: Path) -> str | None:
    """A sentence about the first uid that occurs twice in parquet files with columns ``uid`` and ``key``, if any does.

    ``labels`` say how to call each file in the sentence; temporary files go to ``folder``.
    """
    found = UidParts(files, labels, folder).first()
    if found is None:
        return None
    places = f"in {found.first} key {found.first_key!r} and in {found.where} key {found.key!r}"
    return f"uid {found.uid} occurs twice, {places}"


class SeenUids:
    """Hashes of the uids of the parts that are written; tells early when one occurs again.

    It remembers the first :data:`mmsae.shards.uid_set.MOST`; what repeats a later one is found when the parts are
    merged. A hash alone refuses nothing: where one occurs again the uids are compared.

    ``files`` is ``{parquet file of a part: what to call it}`` of those that an earlier run finished.
    """

    def __init__(self, files: Mapping[Path, str]) -> None:
        self._files, self._hashes = dict(files), Hashes()
        for f in self._files:
            if self._hashes.full:
                break
            self._add(uid_hash(pq.read_table(f, columns=["uid"])["uid"]).tolist())

    def _add(self, hashes: Sequence[int]) -> None:
        for h in hashes:
            self._hashes.add(h)

    @contextmanager
    def part(self, uids: Sequence[str], keys: Sequence[str], file: Path, label: str) -> Iterator[None]:
        """Add the uids of a part that is written to ``file`` in the context; ``label`` is what to call it.

        Raises:
            InputError: One of them occurs twice, in this part or in an earlier one of this process.
        """
        new = uid_hash(uids).tolist()
        if len(set(new)) < len(new) or any(h in self._hashes for h in new):
            with tempfile.TemporaryDirectory() as tmp:
                pq.write_table(pa.table({"uid": uids, "key": keys}), own := Path(tmp) / "part.parquet")
                files = {**self._files, own: label}
                if dup := find_duplicate(list(files), list(files.values()), Path(tmp)):
                    raise InputError(f"{dup}; uids must differ, remove one of the two samples")
        yield
        self._add(new)
        self._files[file] = label
