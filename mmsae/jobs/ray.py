"""Jobs on a Ray cluster: one task per unit, on workers that come and go, each with its host loaded once."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

from mmsae.allocator import keep_memory
from mmsae.errors import EndsJob, InputError, plain_warnings
from mmsae.jobs.estimate import progress_bar
from mmsae.jobs.folder import at_work
from mmsae.jobs.tally import TRIED, Failure, Tally, hopeless, report, said
from mmsae.jobs.units import Share, Work
from mmsae.shards import FaultLog

T = TypeVar("T")
LOOK = 5.0  #: Seconds between two looks at the size of the cluster.
PATIENCE = 30.0  #: Seconds without a worker, after which that is said.


class RayWorkers:
    """An :class:`~mmsae.jobs.units.Engine` of actors of a Ray cluster; a context manager.

    This process leads and gives every worker one unit at a time. A unit whose worker dies is given to another; a worker
    that joins gets units as soon as its host is loaded. Machines need one file system.

    Args:
        devices: Most workers at a time; None: as many as the cluster has room for, whenever it changes.
        gpus: GPUs of a worker; None: 1, or 0 where this process computes on a CPU.
        retries: How often a unit is tried again whose worker died, or that ended with another error than one of the
            input.
        device: Kind of device that is asked for.
        progress: Whether to show a bar.

    Raises:
        InputError: Ray is not installed.
    """

    lead, rank, patient = True, 0, True
    locks: tuple[Path, ...] = ()

    def __init__(
        self,
        devices: int | None,
        gpus: float | None = None,
        retries: int = 2,
        device: str = "auto",
        progress: bool = True,
    ) -> None:
        self.devices, self.retries, self.device, self.gpus = devices, retries, device, gpus or 0
        self._gpus_asked, self.cpus, self.progress = gpus, 1, progress
        self.workers: list[_Worker] = []

    def __enter__(self) -> RayWorkers:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray
        except ModuleNotFoundError as e:
            raise InputError('engine ray needs Ray: pip install "mmsae[ray]"') from e
        import torch

        if self._gpus_asked is None:
            self.gpus = int(self.device.startswith("cuda") or (self.device == "auto" and torch.cuda.is_available()))
        self._ours = not ray.is_initialized()
        self._told = signal.getsignal(signal.SIGTERM)
        if self._ours:
            ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        return self

    def __exit__(self, *error: object) -> None:
        import ray

        for worker in self.workers:
            ray.kill(worker.actor)
        self.workers.clear()
        if self._ours:
            ray.shutdown()
            # Ray leaves a handler of its own, by which a training that follows in this process would end in the middle
            if self._told is not None and threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, self._told)

    @property
    def size(self) -> int:
        """Workers that the cluster has room for now, at least one."""
        room = max(1, self._room())
        return room if self.devices is None else min(self.devices, room)

    @property
    def needs(self) -> str:
        """What a worker takes, for messages."""
        return f"{self.cpus} CPUs and {self.gpus:g} GPUs"

    def elsewhere(self, units: int) -> bool:
        """Always."""
        return True

    def own(self, units: Sequence[int]) -> list[int]:
        """All."""
        return list(units)

    def decoders(self, asked: int | None) -> int:
        """One, where a GPU computes: a worker has one tar at a time, which one process decodes."""
        self.cpus = 1 + (int(self.gpus > 0) if asked is None else asked)
        return self.cpus - 1

    def agree(self, say: Callable[[], T]) -> T:
        """What this process says."""
        return say()

    def wait(self) -> None:
        """There is nobody to wait for."""

    def merge(self, done: Callable[[], bool], do: Callable[[], None]) -> None:
        """Do it."""
        do()

    def run(self, tally: Tally, todo: Sequence[int], here: Work, there: Callable[..., Work], *args: Any) -> None:
        """Do the units on workers; see :class:`~mmsae.jobs.units.Engine`.

        Raises:
            UnitsFailed: Some failed, and the others are done.
            InputError: No worker can start.
        """
        import ray

        if self._ours and not self._room():
            raise InputError(f"a worker takes {self.needs}, and this machine has {_has(ray.cluster_resources())}")
        _Pass(self, tally, todo, [ray.put((there, args, self.locks, os.getcwd()))]).run()

    deal = run

    def _room(self) -> int:
        import ray

        rooms = [0]
        for has in (node["Resources"] for node in ray.nodes() if node["Alive"]):
            room = has.get("CPU", 0) // self.cpus
            rooms.append(int(min(room, has.get("GPU", 0) // self.gpus) if self.gpus else room))
        return sum(rooms)


def _has(resources: dict[str, float]) -> str:
    return f"{resources.get('CPU', 0):g} and {resources.get('GPU', 0):g}"


class _Worker:
    """A worker that was asked for: not ready until its host is loaded, and busy while it has a unit."""

    def __init__(self, actor: Any) -> None:
        self.actor, self.ready, self.unit = actor, False, None


class _Pass:
    """The units of one pass, dealt out to workers one by one.

    ``given`` holds a reference to what is done, in a list so that a worker fetches it once.
    """

    def __init__(self, engine: RayWorkers, tally: Tally, todo: Sequence[int], given: list[Any]) -> None:
        self.engine, self.tally, self.given, self.todo, self.done = engine, tally, given, todo, 0
        self.waiting, self.tries, self.failures = deque(todo), Counter[int](), list[Failure]()
        self.tasks: dict[Any, _Worker] = {}  # {reference: who will answer}
        self.broken: list[str] = []  # why workers could not begin, since one did a unit
        self.room, self.looked, self.idle_since = engine.size, time.monotonic(), time.monotonic()
        for worker in engine.workers:
            self._begin(worker)

    def run(self) -> None:
        """Do them."""
        import ray

        workers = self.engine.workers
        try:
            with progress_bar(self.tally.folder.name, "tar", self.engine.progress, len(self.todo)) as bar:
                while self.waiting or any(w.unit is not None for w in workers):
                    self._hire()
                    self._deal()
                    for task in ray.wait(list(self.tasks), num_returns=1, timeout=LOOK)[0]:
                        self._take(self.tasks.pop(task), task)
                    bar.update(self.done - bar.n)
                    if hopeless(self.failures, self.done):
                        break
        finally:
            for worker in [w for w in workers if not w.ready or w.unit is not None]:
                self._fire(worker)
        report(self.failures, self.todo, self.tally)

    def _hire(self) -> None:
        """Ask for as many workers as there is room and work for."""
        import ray

        engine, workers, now = self.engine, self.engine.workers, time.monotonic()
        if now - self.looked > LOOK:
            self.room, self.looked = engine.size, now
        if any(w.ready for w in workers):
            self.idle_since = now
        elif len(self.broken) >= TRIED:
            raise InputError(f"no worker of Ray can begin: {self.broken[-1]}")
        elif now - self.idle_since > PATIENCE:
            print(f"no worker with {engine.needs} yet: Ray has no room, or all are still loading", flush=True)
            self.idle_since = now
        busy = sum(w.unit is not None for w in workers)
        while len(self.broken) < TRIED and len(workers) < min(self.room, len(self.waiting) + busy):
            make = ray.remote(_Actor).options(num_cpus=engine.cpus, num_gpus=engine.gpus)
            workers.append(worker := _Worker(make.remote()))
            self._begin(worker)

    def _begin(self, worker: _Worker) -> None:
        worker.ready = False
        self.tasks[worker.actor.begin.remote(self.given)] = worker

    def _deal(self) -> None:
        for worker in (w for w in self.engine.workers if w.ready and w.unit is None):
            if self.waiting:
                worker.unit = self.waiting.popleft()
                self.tasks[worker.actor.do.remote(worker.unit)] = worker

    def _fire(self, worker: _Worker) -> None:
        import ray

        self.engine.workers.remove(worker)
        ray.kill(worker.actor)

    def _take(self, worker: _Worker, task: Any) -> None:
        """Judge what a worker has answered."""
        import ray

        unit, worker.unit = worker.unit, None
        try:
            kind, text = ray.get(task)
        except ray.exceptions.RayError as e:
            kind, text = "lost", _why(e)
        if kind in ("lost", "unfit"):
            self._fire(worker)
        if unit is None:
            worker.ready = kind == "ready"
            self.broken += [] if worker.ready else [text]
        elif self.tally.done(unit):  # a worker may be lost after the last it wrote
            self.done += 1
            self.tally.clear(unit)
            self.broken.clear()
        elif kind == "ends":
            raise EndsJob(text)
        elif kind == "input":
            self.failures.append(self.tally.fail(unit, text))
        else:
            self._again(unit, text)

    def _again(self, unit: int, error: str) -> None:
        """Try a unit once more, or give it up."""
        self.tries[unit] += 1
        if self.tries[unit] <= self.engine.retries:
            self.waiting.append(unit)
        else:
            times = f" ({self.tries[unit]} times)" if self.engine.retries else ""
            self.failures.append(self.tally.fail(unit, error + times))


class _Actor:
    """What runs in a process of the cluster: loads what a pass needs once, and does its units one by one."""

    def __init__(self) -> None:
        keep_memory()
        plain_warnings()
        self.held, self.work, self.faults = ExitStack(), None, FaultLog()

    def begin(self, given: list[Any]) -> tuple[str, str]:
        """Get ready for a pass."""
        import ray

        there, args, locks, folder = ray.get(given[0])
        self.held.close()
        self.faults = FaultLog()
        self.work = None  # what the pass before needed goes first
        try:
            for place in (Path(folder), *(lock.parent.absolute() for lock in locks)):
                if not place.exists():
                    raise InputError(f"{place} is not there on {_node()}: workers need one file system")
            os.chdir(folder)  # paths of a job may be relative
            self.held.enter_context(at_work(locks))
            self.work = there(0, *args)
        except Exception as e:
            return "unfit", said(e)
        return "ready", ""

    def do(self, unit: int) -> tuple[str, str]:
        """Do one unit."""
        try:
            self.work(Share([unit], lead=False, faults=self.faults))
        except EndsJob as e:
            return "ends", str(e)
        except InputError as e:
            return "input", str(e)
        except Exception as e:
            return "error", said(e)
        return "done", f"{_node()} has done it, and its part is not here: workers need one file system"


def _node() -> str:
    return os.uname().nodename


def _why(error: Exception) -> str:
    """Why a worker was lost, from what Ray says at length."""
    text = str(error)
    if "low on memory" in text:
        return "its worker was ended, because the machine ran out of memory"
    if "creation task" in text:
        return text.strip().splitlines()[-1].strip()
    if "node has died" in text or "node was" in text:
        return "its worker's machine has left"
    return "its worker was killed or crashed, for want of memory perhaps"
