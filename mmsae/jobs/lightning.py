"""Long jobs over tars under ``Trainer.predict``: Lightning brings the processes and devices, the job its own files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch

from mmsae.shards import UnitBatch


class Lazy:
    """An iterable without a length that asks for its batches when it is iterated.

    Args:
        stream: Called for an iterator.
    """

    def __init__(self, stream: Any):
        self.stream = stream

    def __iter__(self) -> Iterator[UnitBatch]:
        return self.stream()


class LitUnits(pl.LightningModule):
    """A job whose unit of work is one tar, as a LightningModule.

    Every rank takes tars of its own and writes one part file for each; when all are there, rank 0 merges them in the
    order of the tars. So files depend neither on the number of ranks nor on kills. Ranks on several machines need one
    file system. No tensor is exchanged, and nobody waits for another between batches.

    A subclass gives :meth:`begin`, :meth:`batches`, :meth:`add` and :meth:`finish`.
    """

    def begin(self) -> bool:
        """Load what computes, on every rank; False where there is nothing to do."""
        raise NotImplementedError

    def batches(self) -> Iterator[UnitBatch]:
        """Batches of this rank's tars."""
        raise NotImplementedError

    def add(self, step: UnitBatch) -> None:
        """Add a batch; after the last of a tar, write its part."""
        raise NotImplementedError

    def finish(self) -> None:
        """Merge and write, on rank 0."""
        raise NotImplementedError

    # What Lightning calls.

    def setup(self, stage: str) -> None:
        """Begin the job: batches are asked for before any other hook."""
        self.working = self.begin()

    def predict_dataloader(self) -> Iterable[UnitBatch]:
        """This rank's batches."""
        return Lazy(self.batches) if self.working else []

    def transfer_batch_to_device(self, batch: UnitBatch, device: torch.device, dataloader_idx: int) -> UnitBatch:
        """As it is: the host moves what it needs."""
        return batch

    def predict_step(self, batch: UnitBatch, batch_idx: int) -> None:
        """Add a batch."""
        with self._released():
            self.add(batch)

    def on_predict_epoch_end(self) -> None:
        """Wait for all ranks; rank 0 merges."""
        self.trainer.strategy.barrier("parts")
        if self.trainer.is_global_zero:
            with self._released():
                self.finish()
        self.trainer.strategy.barrier("merged")

    @contextmanager
    def _released(self) -> Iterator[None]:
        """Lightning does not call ``teardown`` after an error."""
        try:
            yield
        except BaseException:
            self.teardown("predict")
            raise

    @property
    def root_device(self) -> str:
        """Where this rank computes."""
        return str(self.trainer.strategy.root_device)
