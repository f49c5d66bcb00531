"""Uids that occur twice among the parts of a job, found through partitioned files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq

from mmsae.partitions import by_part, repeated
from mmsae.shards import FaultLog
from mmsae.shards.uids import uid_words


class Repeat(NamedTuple):
    """A sample whose uid an earlier one has."""

    uid: str  #: The uid.
    key: str  #: Its key.
    where: str  #: What its part is called.
    first_key: str  #: Key of the first sample with this uid.
    first: str  #: What that one's part is called.


class UidParts:
    """Parts of a job in the order of its units, each a parquet file with columns ``uid`` and ``key``.

    Args:
        files: The parts; one without any sample may lack ``key``.
        labels: What each is called: the name of its shard.
        folder: Where temporary files go, 24 bytes a sample.
    """

    def __init__(self, files: Sequence[Path], labels: Sequence[str], folder: Path) -> None:
        self.files, self.labels, self.folder = list(files), list(labels), folder

    @cached_property
    def starts(self) -> np.ndarray:
        """Number of the first sample of each part, and of all of them last."""
        return np.cumsum([0, *(pq.read_metadata(f).num_rows for f in self.files)])

    def words(self) -> Iterator[np.ndarray]:
        """The uids of every part, see :func:`mmsae.shards.uids.uid_words`."""
        for file in self.files:
            yield uid_words(pq.read_table(file, columns=["uid"])["uid"])

    def _repeated(self) -> Iterator[tuple[int, np.ndarray]]:
        return by_part(repeated(self.words, self.folder), self.starts)

    def _part_of(self, row: int) -> int:
        return int(np.searchsorted(self.starts, row, side="right")) - 1

    def _cells(self, part: int, rows: np.ndarray) -> list[dict[str, str]]:
        at = rows.astype(np.int64) - self.starts[part]
        return pq.read_table(self.files[part], columns=["uid", "key"]).take(at).to_pylist()

    def first(self) -> Repeat | None:
        """The first sample whose uid came before; None where all differ."""
        for part, pairs in self._repeated():
            earlier = self._part_of(pairs[0, 1])
            [own], [other] = self._cells(part, pairs[:1, 0]), self._cells(earlier, pairs[:1, 1])
            return Repeat(own["uid"], own["key"], self.labels[part], other["key"], self.labels[earlier])
        return None

    def drop(self, rewrite: Callable[[int, np.ndarray, FaultLog], None]) -> int:
        """Have every part with repeats written without them, and count them as ``duplicate``.

        Args:
            rewrite: Writes part i anew with the samples that a mask ``(n,)`` says, and adds what the log counted to its
                faults.

        Returns:
            How many repeats there were.
        """
        dropped = 0
        for part, pairs in self._repeated():
            log = FaultLog(keep=10**6)
            for cells, first in zip(self._cells(part, pairs[:, 0]), pairs[:, 1].tolist(), strict=True):
                said = f"uid {cells['uid']} is in {self.labels[self._part_of(first)]} already"
                log.add("duplicate", self.labels[part], cells["key"], said)
            new = np.ones(self.starts[part + 1] - self.starts[part], bool)
            new[pairs[:, 0].astype(np.int64) - self.starts[part]] = False
            rewrite(part, new, log)
            dropped += len(pairs)
        return dropped
