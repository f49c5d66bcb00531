"""Units of work of a long job, and who does them: one input tar is one unit, with one part file, whole or not there.

So a killed job goes on where it stopped, and its result depends neither on kills nor on ranks or workers.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from mmsae.files import atomic_file, disk_errors
from mmsae.jobs.estimate import progress_bar
from mmsae.jobs.tally import FAILED, Tally
from mmsae.shards import FaultLog, UnitBatch
from mmsae.shards.shard import as_shard, identity
from mmsae.types import ImageTextBatch

T = TypeVar("T")
Part = bytes | Callable[[Path], None]
"""The content of a part file, or a function that writes it to the path it is given."""


class Unit(NamedTuple):
    """One input tar of a job."""

    index: int  #: Its place in the job; parts are merged in this order.
    path: str  #: The tar, as it was given.
    #: Name of its part file without the suffix: place, file name, and a hash of name and size in bytes, so that the
    #: part of a shard that was replaced since is not taken for its part.
    name: str


def units(paths: Sequence[str]) -> list[Unit]:
    """The units of a job over these shards, in this order."""
    made = []
    for i, shard in enumerate(map(as_shard, paths)):
        known = "\0".join(map(str, identity([shard])[0]))
        tag = blake2b(known.encode(), digest_size=4).hexdigest()
        made.append(Unit(i, shard, f"{i:06d}-{os.path.basename(shard.file).split('.')[0]}-{tag}"))
    return made


class Parts:
    """The part files of some units, in a folder.

    Args:
        folder: The folder; made when the first part is written.
        paths: The shards of the whole job.
        suffix: Ending of the part files.
    """

    def __init__(self, folder: str | Path, paths: Sequence[str], suffix: str = ".part") -> None:
        self.folder, self.units, self.suffix = Path(folder), units(paths), suffix

    def path(self, unit: Unit) -> Path:
        """Where the part of a unit is."""
        return self.folder / (unit.name + self.suffix)

    def done(self, unit: Unit) -> bool:
        """Whether the part of a unit is there; if it is, it is whole."""
        return self.path(unit).exists()

    def missing(self) -> list[Unit]:
        """Units whose part is not there."""
        return [u for u in self.units if not self.done(u)]

    def files(self) -> list[Path]:
        """All part files in the order of the units, whether or not they are there."""
        return [self.path(u) for u in self.units]

    @property
    def tally(self) -> Tally:
        """Which are done."""
        return Tally(self.folder, [u.path for u in self.units], [p.name for p in self.files()])

    def write(self, unit: Unit, part: Part) -> Path:
        """Write the part of a unit under a temporary name, then rename it.

        Raises:
            InputError: The disk is full; nothing is left behind.
        """
        target = self.path(unit)
        for killed in self.folder.glob(f".{glob.escape(target.name)}.tmp*"):  # a unit has one owner: nobody writes it
            killed.unlink()
        with disk_errors(target), atomic_file(target) as temporary:
            temporary.write_bytes(part) if isinstance(part, bytes) else part(temporary)
        target.with_name(target.name + FAILED).unlink(missing_ok=True)
        return target

    def work(self, make: Callable[[str], Part], share: Share, what: str = "shards", progress: bool = True) -> None:
        """Write the parts of a share, one shard after the other.

        ``make`` gives the part of the shard at a path; ``what`` is the label of the bar.
        """
        with progress_bar(what, "tar", progress and share.lead, len(share.units)) as bar:
            for unit in map(self.units.__getitem__, share.units):
                if share.stopped():
                    return
                self.write(unit, make(unit.path))
                bar.update()


class Share(NamedTuple):
    """What one process does of some work."""

    units: list[int]  #: Its units.
    lead: bool = True  #: Whether it shows its progress.
    #: Says whether the work has failed elsewhere, so that this process need not go on.
    stopped: Callable[[], bool] = lambda: False
    #: The faults of what this process did before, which count when their share is judged; None: it does nothing else.
    faults: FaultLog | None = None


Work = Callable[[Share], None]
"""Does a share of some work."""


class Engine(Protocol):
    """The processes of a job."""

    lead: bool  #: Whether this process is the one that merges and writes.
    size: int  #: Number of processes that work; none where there is only something to merge.
    rank: int  #: Which of them this is.
    patient: bool  #: Whether to wait for processes that work on the job, where this one is to lead it.
    #: Locks of jobs for those that work and do not lead (``JobFolder.lock``); set them before the first work.
    locks: tuple[Path, ...]

    def elsewhere(self, units: int) -> bool:
        """Whether so many units are done by other processes, which load what they need themselves."""

    def own(self, units: Sequence[int]) -> list[int]:
        """Those of some units that this process does or has done by others; all are some process's own."""

    def decoders(self, asked: int | None) -> int:
        """Decoding processes beside each process that works; ``asked``, if that is a number."""

    def agree(self, say: Callable[[], T]) -> T:
        """What the leading process says, and nobody else is asked."""

    def wait(self) -> None:
        """Wait until all processes are here."""

    def merge(self, done: Callable[[], bool], do: Callable[[], None]) -> None:
        """A step between two passes, or after the last, that the leading process does; the others wait for it.

        Args:
            done: Whether what others need of it is there.
            do: Does it.

        Raises:
            Waiting: It is not done, and nobody leads.
        """

    def run(self, tally: Tally, todo: Sequence[int], here: Work, there: Callable[..., Work], *args: Any) -> None:
        """Deal units out among the processes, and wait until they are done.

        Args:
            tally: The pass that they are of.
            todo: The units.
            here: Does a share in a process that runs the whole job.
            there: Makes what does shares in a process that has nothing but its arguments, as ``there(rank, *args)``; a
                function of a module. It is asked once for each process and pass.
            *args: Plain values.

        Raises:
            UnitsFailed: Some units failed, and the others are done.
            Waiting: Other processes have to go on.
        """

    def deal(self, tally: Tally, todo: Sequence[int], here: Work, there: Callable[..., Work], *args: Any) -> None:
        """Deal out work of a merge, as :meth:`run` does units; a process that only merges does it, too."""


def do_missing(engine: Engine, tally: Tally, here: Work, there: Callable[..., Work], *args: Any) -> None:
    """Do the units of a pass that are not done, on an engine; see :meth:`Engine.run`."""
    if todo := missing(engine, tally):
        engine.run(tally, todo, here, there, *args)


def missing(engine: Engine, tally: Tally) -> list[int]:
    """The units of a pass that are not done, as its leading process says."""
    if todo := engine.agree(tally.missing):
        tally.note()
    return todo


class TarWork(Protocol):
    """What is made of one tar."""

    def add(self, batch: ImageTextBatch, log: FaultLog) -> None:
        """Add a batch that has samples; those that cannot be used are counted."""

    def finish(self, faults: FaultLog) -> None:
        """Write the part; ``faults`` are all of its tar."""

    def close(self) -> None:
        """Let go of what is held; without :meth:`finish` before it, nothing is left."""


def work_tars(
    stream: Iterator[UnitBatch],
    begin: Callable[[str], TarWork],
    share: Share,
    what: str,
    fault_limit: float,
    progress: bool,
) -> None:
    """Write the parts of one process's tars, batch by batch.

    The batches of ``stream`` never cross tars; ``begin`` makes what those of a tar are added to. The leading process
    shows a bar, called ``what``.

    Raises:
        InputError: A larger share of samples than ``fault_limit`` is unusable.
    """
    total, begun, logs, done = share.faults or FaultLog(), {}, {}, 0
    with progress_bar(what, "sample", progress and share.lead) as bar, closing(stream):
        try:
            for path, batch, last, _ in stream:
                if share.stopped():
                    return
                if path not in begun:
                    begun[path], logs[path] = begin(path), FaultLog()
                log = FaultLog()
                log.merge(batch.faults)
                if batch.uids:
                    begun[path].add(batch, log)
                faults = log.take()
                logs[path].merge(faults)
                total.merge(faults)
                bar.update(len(batch.uids))
                if last:
                    begun[path].finish(logs.pop(path))
                    begun.pop(path).close()
                    done += 1
                    bar.set_postfix(tars=f"{done}/{len(share.units)}", dropped=total.dropped)
                total.check(fault_limit)
        finally:
            for unit in begun.values():
                unit.close()
