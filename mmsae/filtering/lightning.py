"""``mmsae filter`` as a LightningModule: the same stages and files, with the ranks of a trainer as processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from mmsae.filtering.command import write_filter_report
from mmsae.filtering.job import Plan, Result, finish, plan_job, prepare
from mmsae.filtering.run import Pass, Processes, TarWork, announce
from mmsae.filtering.scorers.clip import PairReader, Scorer
from mmsae.jobs.folder import at_work
from mmsae.jobs.lightning import LitUnits
from mmsae.shards import UnitBatch


class Ranks(Processes):
    """The ranks of a trainer, every one of which runs the job's stages.

    Args:
        trainer: The trainer.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        super().__init__(trainer.world_size)
        self.strategy, self.rank, self.lead = trainer.strategy, trainer.global_rank, trainer.is_global_zero

    def agree(self, value: Any) -> Any:
        """What rank 0 says."""
        return self.strategy.broadcast(value)

    def wait(self) -> None:
        """Until all ranks are here."""
        self.strategy.barrier("filter")

    def own(self, todo: list[int]) -> list[int]:
        """This rank's share."""
        return todo[self.rank :: self.devices]

    def run(self, job: Pass, worker: Scorer | PairReader, todo: list[int]) -> None:
        """Do this rank's share of some tars, and wait for the others."""
        with at_work(Path(job.folder).parent / "workers.lock"):
            TarWork(job, worker, self.own(todo), self.lead).run()
        self.wait()


class LitFilter(LitUnits):
    """``mmsae filter`` for ``Trainer.predict``, on any number of ranks.

    Args:
        sae: SAE folder or hub id.
        shards: Path, folder, glob or brace pattern of the tars to filter, or a list of them.
        out: Folder of the result; it appears when everything is done.
        **options: The other arguments of :func:`mmsae.filtering.job.plan_job`; the trainer chooses devices.
    """

    present: Callable[[Result], None] | None = None

    def __init__(self, sae: str, shards: str | list[str], out: str, **options: Any):
        super().__init__()
        self.sae, self.shards, self.out = sae, shards, out
        self.options = options  # on a line of its own: jsonargparse reads from it which options there are

    def _plan(self) -> Plan:
        world = self.trainer.world_size
        return plan_job(self.sae, self.shards, self.out, device=self.root_device, devices=world, progress=True,
                        **self.options)  # fmt: skip

    def begin(self) -> bool:
        """Load host and SAE; fit what is to be fitted."""
        ranks, self.holds = Ranks(self.trainer), ExitStack()
        plan = self._plan() if ranks.lead else None
        if ranks.lead and not plan.folder.finished:
            self.holds.enter_context(plan.folder.lead())
        ranks.wait()  # the folder is there and rank 0's before any other looks at it
        self.plan = plan or self._plan()
        if self.plan.folder.finished:
            if ranks.lead:
                print(f"{self.out}: finished before; nothing to do")
            return False
        try:
            self.ready = prepare(self.plan, ranks)
        except BaseException:
            self.holds.close()
            raise
        run, worker = self.ready.run, self.ready.worker
        todo = ranks.agree(run.missing())
        if ranks.lead and todo:
            announce(run, worker, todo, min(ranks.devices, len(todo)))
        Path(run.folder).mkdir(parents=True, exist_ok=True)
        self.holds.enter_context(at_work(self.plan.folder.lock))
        self.work = TarWork(run, worker, ranks.own(todo), lead=False)  # the trainer has a bar of its own
        return True

    def batches(self) -> Iterator[UnitBatch]:
        """Batches of this rank's tars."""
        return self.work.stream()

    def add(self, step: UnitBatch) -> None:
        """Score a batch."""
        self.work.add(step)

    def finish(self) -> None:
        """Choose, and write the result."""
        print(finish(self.plan, self.ready, self.ready.run.parts(), self.present))

    def teardown(self, stage: str) -> None:
        """Give the folder free."""
        self.holds.close()


class Filter(LitFilter):
    """``mmsae filter`` on the ranks of a trainer, with ``report.html``."""

    present = staticmethod(write_filter_report)
