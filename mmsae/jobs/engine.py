"""Who does a job: the small interface of processes of one machine, of Lightning's ranks, and of what else may come."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol


class Share(NamedTuple):
    """What one process does of some work.

    Attributes:
        units: Its units.
        rank: Number of the process, which chooses its device.
        lead: Whether it shows its progress.
        stopped: Says whether the work has failed elsewhere, so that this process need not go on.
    """

    units: list[int]
    rank: int = 0
    lead: bool = True
    stopped: Callable[[], bool] = lambda: False


class Engine(Protocol):
    """The processes of a job.

    Attributes:
        lead: Whether this process is the one that merges and writes.
        size: Number of processes that work.
        rank: Which of them this is.
        lock: The job's lock for those that work and do not lead (``JobFolder.lock``); set it before the first work.
    """

    lead: bool
    size: int
    rank: int
    lock: Path | None

    def agree(self, value: Any) -> Any:
        """What the leading process says."""

    def wait(self) -> None:
        """Wait until all processes are here."""

    def run(self, todo: Sequence[int], here: Callable[[Share], None], there: Callable[..., None], *args: Any) -> None:
        """Deal units out among the processes, and wait until they are done; the first failure of one ends all.

        Args:
            todo: The units.
            here: Does a share in a process that runs the whole job.
            there: Does a share in a process that has nothing but its arguments, as ``there(share, *args)``; a function
                of a module.
            *args: Plain values.
        """
