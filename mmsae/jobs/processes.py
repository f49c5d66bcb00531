"""Processes beside the one that leads, which end with it whatever kills it."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, TypeVar

from mmsae.allocator import keep_memory
from mmsae.errors import InputError, plain_warnings
from mmsae.jobs.folder import at_work
from mmsae.jobs.tally import Tally, UnitsFailed, go_on, report
from mmsae.jobs.units import Share, Work

T = TypeVar("T")


def end_with_parent() -> None:
    """From now on, end this process when the one that started it has ended, whatever it is doing or waiting for."""
    threading.Thread(target=_follow, args=(os.getppid(),), daemon=True).start()


def _follow(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.1)
    os._exit(1)  # as safe as a kill; whoever goes on with the job must not meet this process


class Local:
    """An :class:`~mmsae.jobs.units.Engine` of this process, or of several on this machine; a context manager.

    The other processes start when the first work needs them, and stay for what follows.

    Args:
        size: Their number; with one, everything is done in the process that leads.
    """

    lead, rank, patient = True, 0, True
    locks: tuple[Path, ...] = ()

    def __init__(self, size: int = 1) -> None:
        self.size = size
        self._pool: ProcessPoolExecutor | None = None
        self._stop: Any = None

    def __enter__(self) -> Local:
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self._stop.set()
            self._pool.shutdown()

    def elsewhere(self, units: int) -> bool:
        """Whether more than one process works."""
        return min(self.size, units) > 1

    def own(self, units: Sequence[int]) -> list[int]:
        """All."""
        return list(units)

    def decoders(self, asked: int | None) -> int:
        """As many as there are free cores, 8 at most."""
        return decoders(asked, self.size)

    def agree(self, say: Callable[[], T]) -> T:
        """What this process says."""
        return say()

    def wait(self) -> None:
        """There is nobody to wait for: the others only work while this process waits for them."""

    def merge(self, done: Callable[[], bool], do: Callable[[], None]) -> None:
        """Do it; it is quick where it is done."""
        do()

    def run(self, tally: Tally, todo: Sequence[int], here: Work, there: Callable[..., Work], *args: Any) -> None:
        """Do it here, or share it out among the other processes; see :class:`~mmsae.jobs.units.Engine`.

        Raises:
            UnitsFailed: Some units failed, and the others are done.
        """
        if not self.elsewhere(len(todo)):
            go_on(lambda units: here(Share(units)), todo, tally)
            return
        self._share(todo, tally, there, *args)
        report([f for u, f in tally.failed().items() if u in set(todo)], todo, tally)

    def deal(self, tally: Tally, todo: Sequence[int], here: Work, there: Callable[..., Work], *args: Any) -> None:
        """The same for work of which each piece has to be done: the first that fails ends all."""
        if not self.elsewhere(len(todo)):
            here(Share(list(todo)))
            return
        self._share(todo, None, there, *args)

    def _share(self, todo: Sequence[int], tally: Tally | None, there: Callable[..., Work], *args: Any) -> None:
        """Have the other processes do some units; with a tally, each of them goes on without those that fail."""
        size = min(self.size, len(todo))
        if self._pool is None:
            context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
            self._stop = context.Event()
            given = self._stop, context.Value("i", 0), self.locks
            self._pool = ProcessPoolExecutor(self.size, context, _start, given)
        jobs = [self._pool.submit(_work, there, list(todo[r::size]), r == 0, tally, *args) for r in range(size)]
        self._result(jobs)

    def _result(self, jobs: list[Future]) -> None:
        """Wait for all, and where one fails, let the others end.

        Raises:
            InputError: One was killed.
        """
        failed = next((j.exception() for j in wait(jobs, return_when=FIRST_EXCEPTION).done if j.exception()), None)
        if not failed:
            return
        self._stop.set()
        wait(jobs)
        self._stop.clear()
        if isinstance(failed, BrokenProcessPool):  # what follows needs other processes
            self._pool.shutdown()
            self._pool = None
            raise InputError(
                "a process was killed or crashed, for want of memory perhaps; "
                "what is done is kept, and the same command goes on"
            ) from failed
        raise failed


_stop: Any = None  # in the processes of a pool: an event, set when the work has failed in one of them
_rank = 0  # there too: which device is this process's
_held = ExitStack()  # there too: the locks of jobs, until the process ends


def _start(stop: Any, count: Any, locks: Sequence[Path]) -> None:
    global _stop, _rank
    with count.get_lock():
        _rank, count.value = count.value, count.value + 1
    _stop = stop
    keep_memory()
    plain_warnings()
    end_with_parent()
    _held.enter_context(at_work(locks))


def _stopped() -> bool:
    return _stop.is_set()


def _work(there: Callable[..., Work], units: list[int], lead: bool, tally: Tally | None, *args: Any) -> None:
    work = there(_rank, *args)
    if tally is None:
        work(Share(units, lead, _stopped))
        return
    with suppress(UnitsFailed):  # the tally has them, for the process that leads
        go_on(lambda some: work(Share(some, lead, _stopped)), units, tally)


def decoders(asked: int | None, processes: int) -> int:
    """Decoding processes for each of some processes on this machine: the free cores, 8 at most, if nobody says."""
    return min(8, max(0, (os.cpu_count() or 1) // max(1, processes) - 1)) if asked is None else asked


class SideProcess:
    """``python -m MODULE ARGUMENTS`` with one thread; the module calls :func:`main`, its output goes to ``log``.

    Errors say ``what`` it is: "the ... part of the demo".
    """

    def __init__(self, module: str, log: Path, what: str, *args: object):
        self.log, self.what = log, what
        command, env = [sys.executable, "-m", module, *map(str, args)], os.environ | {"OMP_NUM_THREADS": "1"}
        with self.log.open("w") as out:
            self.process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=env)

    def wait(self) -> None:
        """Wait until it is done.

        Raises:
            RuntimeError: It failed; with the end of its log.
        """
        if self.process.wait():
            end = "\n".join(self.log.read_text().splitlines()[-12:])
            raise RuntimeError(f"the {self.what} part of the demo failed (all of it in {self.log}):\n{end}")

    def stop(self) -> None:
        """End it, if it runs."""
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait()


def main(run: Callable[[Path, str, int], None]) -> None:
    """What the module of a :class:`SideProcess` does when it is started: ``run(root, profile, seed)``."""
    import torch

    keep_memory()
    torch.set_num_threads(1)
    end_with_parent()
    run(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
