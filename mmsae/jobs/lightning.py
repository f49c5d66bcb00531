"""Jobs under ``Trainer.predict``: Lightning brings the processes and devices, the job its own files."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from mmsae.jobs.engine import Share
from mmsae.jobs.folder import at_work
from mmsae.shards import UnitBatch


class Ranks:
    """The ranks of a trainer, every one of which runs the whole job; an :class:`~mmsae.jobs.engine.Engine`.

    Ranks on several machines need one file system.

    Args:
        trainer: The trainer.
    """

    lock: Path | None = None

    def __init__(self, trainer: pl.Trainer) -> None:
        self.strategy, self.size = trainer.strategy, trainer.world_size
        self.rank, self.lead = trainer.global_rank, trainer.is_global_zero

    def agree(self, value: Any) -> Any:
        """What rank 0 says."""
        return self.strategy.broadcast(value)

    def wait(self) -> None:
        """Wait until all ranks are here."""
        self.strategy.barrier("job")

    def run(self, todo: Sequence[int], here: Callable[[Share], None], there: Callable[..., None], *args: Any) -> None:
        """Do this rank's share, and wait for the others."""
        with nullcontext() if self.lock is None else at_work(self.lock):
            here(Share(list(todo[self.rank :: self.size]), self.rank, self.lead))
        self.wait()


class LitJob(pl.LightningModule):
    """A job whose unit of work is one tar, as a LightningModule; a subclass gives :meth:`work`.

    Every rank takes tars of its own and writes one part file for each; when all are there, rank 0 merges them in the
    order of the tars. So files depend neither on the number of ranks nor on kills. No tensor is exchanged, and nobody
    waits for another between batches.
    """

    def work(self, ranks: Ranks, device: str) -> None:
        """Do the whole job, on every rank.

        Args:
            ranks: All of them.
            device: This rank's device.
        """
        raise NotImplementedError

    def setup(self, stage: str) -> None:
        """Do the job."""
        self.work(Ranks(self.trainer), str(self.trainer.strategy.root_device))
        # the job reads its shards itself, so there is nothing left to loop over
        warnings.filterwarnings("ignore", "Total length of `list` across ranks is zero")

    def predict_dataloader(self) -> list[Any]:
        """Nothing to loop over."""
        return []

    def predict_step(self, *batch: Any) -> None:
        """There are no batches; Lightning wants the method."""


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
