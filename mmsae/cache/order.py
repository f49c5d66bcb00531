"""In which order an epoch visits rows: blocks of neighbours are shuffled, so that a disk is still read in long runs."""

from __future__ import annotations

import numpy as np


class BlockOrder:
    """The rows of a split in block-shuffled order, computed where needed instead of kept.

    Args:
        keep: ``(N,) bool``, the rows that belong to the split.
        block: Neighbouring rows that stay together.
        seed: Of the block order; the rows' places inside a window are the loader's affair.
    """

    def __init__(self, keep: np.ndarray, block: int, seed: int) -> None:
        self.keep, self.block, self.seed = keep, block, seed
        starts = np.arange(0, len(keep), block)
        self._counts = np.add.reduceat(keep, starts, dtype=np.int64) if len(keep) else np.zeros(0, np.int64)
        self._epoch: int | None = -1
        self._use(None)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def _use(self, epoch: int | None) -> None:
        if epoch != self._epoch:
            blocks = np.arange(len(self._counts))
            if epoch is not None:
                np.random.default_rng([self.seed, epoch]).shuffle(blocks)
            self._epoch, self._blocks, self._ends = epoch, blocks, np.cumsum(self._counts[blocks])

    def span(self, epoch: int | None, lo: int, hi: int) -> np.ndarray:
        """Row numbers at places ``lo`` to ``hi`` of an epoch's sequence; ``epoch=None``: in stored order."""
        self._use(epoch)
        if hi <= lo:
            return np.zeros(0, np.int64)
        a, b = np.searchsorted(self._ends, [lo, hi - 1], side="right")
        rows = [np.flatnonzero(self.keep[j : j + self.block]) + j for j in self._blocks[a : b + 1] * self.block]
        skip = lo - int(self._ends[a] - self._counts[self._blocks[a]])
        return np.concatenate(rows)[skip : skip + hi - lo]
