"""Jobs under ``Trainer.predict``: Lightning brings the processes and devices, the job its own files."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import lightning.pytorch as pl

from mmsae.jobs.folder import at_work
from mmsae.jobs.processes import decoders
from mmsae.jobs.tally import Tally, UnitsFailed, go_on, report
from mmsae.jobs.units import Share, Work

T = TypeVar("T")


class Ranks:
    """The ranks of a trainer, every one of which runs the whole job; an :class:`~mmsae.jobs.units.Engine`.

    Ranks on several machines need one file system.
    """

    patient = True
    locks: tuple[Path, ...] = ()

    def __init__(self, trainer: pl.Trainer) -> None:
        self.strategy, self.size = trainer.strategy, trainer.world_size
        self.rank, self.lead = trainer.global_rank, trainer.is_global_zero

    def elsewhere(self, units: int) -> bool:
        """No: every rank has loaded what it needs."""
        return False

    def own(self, units: Sequence[int]) -> list[int]:
        """All, for rank 0."""
        return list(units) if self.lead else []

    def decoders(self, asked: int | None) -> int:
        """As many as there are free cores, 8 at most."""
        return decoders(asked, self.size)

    def agree(self, say: Callable[[], T]) -> T:
        """What rank 0 says."""
        return self.strategy.broadcast(say() if self.lead else None)

    def wait(self) -> None:
        """Wait until all ranks are here."""
        self.strategy.barrier("job")

    def merge(self, done: Callable[[], bool], do: Callable[[], None]) -> None:
        """Rank 0 does it."""
        if self.lead:
            do()
        self.wait()

    def run(self, tally: Tally, todo: Sequence[int], here: Work, there: Callable[..., Work], *args: Any) -> None:
        """Do this rank's share, and wait for the others.

        Raises:
            UnitsFailed: Some units failed, of this rank or another, and the others are done.
        """
        mine = list(todo[self.rank :: self.size])
        with at_work(self.locks), suppress(UnitsFailed):
            go_on(lambda units: here(Share(units, self.lead)), mine, tally)
        self.wait()
        report([f for u, f in self.agree(tally.failed).items() if u in set(todo)], todo, tally)

    def deal(self, tally: Tally, todo: Sequence[int], here: Work, there: Callable[..., Work], *args: Any) -> None:
        """Do this rank's share of what has to be done, and wait for the others."""
        with at_work(self.locks):
            here(Share(list(todo[self.rank :: self.size]), self.lead))
        self.wait()


class LitJob(pl.LightningModule):
    """A job whose unit of work is one tar, as a LightningModule; a subclass gives :meth:`work`.

    Every rank takes tars of its own and writes one part file for each; when all are there, rank 0 merges them in the
    order of the tars. So files depend neither on the number of ranks nor on kills. No tensor is exchanged, and nobody
    waits for another between batches.
    """

    def work(self, ranks: Ranks, device: str) -> None:
        """Do the whole job, on every rank; ``device`` is this rank's."""
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
