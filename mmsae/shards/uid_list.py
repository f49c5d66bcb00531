"""A list of the uids that a job may use: DataComp's sorted file, looked into where it lies."""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Iterator
from hashlib import blake2b
from typing import Any

import numpy as np

from mmsae.shards.uids import DATACOMP, hex_uids
from mmsae.types import InputError

_BLOCK = 1 << 20


class UidList:
    """A mapped ``.npy`` file of sorted uids, dtype ``u8,u8``, as ``mmsae filter`` and DataComp write it.

    It is read once, for its hash and its order; then it costs half a megabyte of memory, beside pages of the file that
    the system takes back when it needs them. It travels to other processes by its path.

    Args:
        path: The file.

    Attributes:
        hash: Hex blake2b-128 of the uids, by which a job knows the list again.

    Raises:
        InputError: There is no such file, it is none of uids, or they are not sorted.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self._open()
        hashed, counts, last = blake2b(digest_size=16), np.zeros(1 << 16, np.int64), None
        for at, block in self._blocks():
            hashed.update(block.tobytes())
            counts += np.bincount((block[:, 0] >> np.uint64(48)).astype(np.int64), minlength=1 << 16)
            before = block if last is None else np.concatenate([last, block])
            self._check(before, at - (last is not None))
            last = block[-1:]
        self.hash = hashed.hexdigest()
        self._starts = np.concatenate([[0], counts.cumsum()])

    @classmethod
    def of(cls, path: str | None) -> UidList | None:
        """The list in a file, None where there is no file."""
        return None if path is None else cls(path)

    def _open(self) -> None:
        try:
            found = np.load(self.path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as e:
            raise InputError(f"{self.path}: not a list of uids that can be read: {e}") from e
        if not isinstance(found, np.ndarray) or found.dtype != DATACOMP or found.ndim != 1:
            what = f"{found.dtype} of shape {found.shape}" if isinstance(found, np.ndarray) else "an archive"
            raise InputError(
                f"{self.path}: it holds {what}, a list of uids is u8,u8 of one dimension, as mmsae filter writes"
            )
        self._rows = found.view(np.uint64).reshape(-1, 2)

    def _blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        for at in range(0, len(self._rows), _BLOCK):
            yield at, np.array(self._rows[at : at + _BLOCK])

    def _check(self, block: np.ndarray, at: int) -> None:
        one, two = block[:-1], block[1:]
        wrong = (one[:, 0] > two[:, 0]) | ((one[:, 0] == two[:, 0]) & (one[:, 1] >= two[:, 1]))
        if wrong.any():
            i = int(wrong.argmax())
            [a, b] = hex_uids(block[i : i + 2])
            raise InputError(f"{self.path}: uids must ascend, and entry {at + i} is {a} and entry {at + i + 1} is {b}")

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "hash": self.hash, "_starts": self._starts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open()

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, uid: str) -> bool:
        wanted = int(uid[:16], 16), int(uid[16:], 16)
        lo, hi = self._starts[wanted[0] >> 48 :][:2].tolist()
        at = bisect_left(range(lo, hi), wanted, key=lambda i: tuple(self._rows[i].tolist())) + lo
        return at < hi and tuple(self._rows[at].tolist()) == wanted

    def among(self, words: np.ndarray) -> np.ndarray:
        """``(N,) bool``, which of some uids are listed; ``words (N, 2)`` are theirs, see ``uid_words``."""
        top = (words[:, 0] >> np.uint64(48)).astype(np.int64)
        lo, hi = self._starts[top], self._starts[top + 1]
        end = hi
        while (open_ := lo < hi).any():
            middle = (lo + hi) // 2
            rows = self._rows[np.minimum(middle, len(self) - 1)]
            less = (rows[:, 0] < words[:, 0]) | ((rows[:, 0] == words[:, 0]) & (rows[:, 1] < words[:, 1]))
            lo, hi = np.where(open_ & less, middle + 1, lo), np.where(open_ & ~less, middle, hi)
        if not len(self):
            return np.zeros(len(words), bool)
        return (lo < end) & (self._rows[np.minimum(lo, len(self) - 1)] == words).all(1)

    def said(self, found: int) -> str:
        """A sentence about how many of the uids occurred."""
        unseen = max(0, len(self) - found)
        return f"keep: {found:,} of the {len(self):,} uids of {self.path} occur, {unseen:,} were not seen"
