"""A job in parts that know nothing of each other, as tasks of a batch queue: ``--part I/N``, then ``--merge``.

A part does the units whose number leaves its remainder by the number of parts. It neither merges nor waits: where the
job needs what a merge makes, between two passes or at the end, it says so and ends.
"""

from __future__ import annotations

import fcntl
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from mmsae.errors import InputError
from mmsae.jobs.folder import at_work
from mmsae.jobs.processes import Local
from mmsae.jobs.tally import Tally, Waiting, told
from mmsae.jobs.units import Work

T = TypeVar("T")
WHOLE = "none"  #: What ``--part`` says where an array of tasks is no array of parts.
SLURM = "SLURM_ARRAY_TASK_"


def parse_part(text: str) -> tuple[int, int]:
    """The part and the number of parts that ``I/N`` says.

    Raises:
        InputError: It says something else.
    """
    found = re.fullmatch(r"(\d+)/(\d+)", text.strip())
    part, parts = map(int, found.groups()) if found else (0, 0)
    if not 1 <= part <= parts:
        raise InputError(f"part is {text}; it is I/N, the I-th of N parts, with I from 1 to N, as 3/8")
    return part, parts


def part_of_array(environment: Mapping[str, str]) -> str:
    """``I/N`` of a task in an array of Slurm, empty where this is none or its only task.

    Raises:
        InputError: The numbers of the array's tasks have gaps, so that they say no part.
    """
    names = ("ID", "MIN", "MAX", "STEP", "COUNT")
    if not {SLURM + n for n in ("ID", "COUNT")} <= set(environment):
        return ""
    number = {n: int(environment[SLURM + n]) for n in names if environment.get(SLURM + n, "").isdigit()}
    count, low, step = number.get("COUNT", 1), number.get("MIN", 0), max(1, number.get("STEP", 1))
    if count == 1 and number.get("MAX", low) == low:
        return ""
    at, rest = divmod(number.get("ID", -1) - low, step)
    if rest or not 0 <= at < count or number.get("MAX", low + (count - 1) * step) != low + (count - 1) * step:
        told = ", ".join(f"{SLURM}{n}={environment[SLURM + n]}" for n in names if SLURM + n in environment)
        raise InputError(f"{told}: an array with gaps; say --part I/N with the I and N of the whole array")
    return f"{at + 1}/{count}"


class PartOf(Local):
    """An :class:`~mmsae.jobs.units.Engine` that does one part of every pass.

    Args:
        part: Which part it is, from 1 on.
        parts: Their number.
        size: Processes on this machine that share the part.
    """

    lead = False

    def __init__(self, part: int, parts: int, size: int = 1) -> None:
        super().__init__(size)
        self.part, self.parts = part, parts

    def __exit__(self, kind: type | None = None, error: object = None, *where: object) -> bool:
        super().__exit__(kind, error, *where)
        return _told(error)

    def merge(self, done: Callable[[], bool], do: Callable[[], None]) -> None:
        """Go on where it is done.

        Raises:
            Waiting: It is not.
        """
        if not done():
            raise Waiting(f"{self}: nothing is left to do before the parts are merged; next: --merge")

    def run(self, tally: Tally, todo: Sequence[int], here: Work, there: Callable[..., Work], *args: Any) -> None:
        """Do the units of this part.

        Raises:
            InputError: Another process does this part of the job, or a part of another number.
            UnitsFailed: Some of its units failed, and the others are done.
            Waiting: It is done.
        """
        mine = self.own(todo)
        print(
            f"{self}: {len(mine)} shards of {tally.folder.name} to do, of {len(tally.files)} in all parts", flush=True
        )
        with self._alone():
            super().run(tally, mine, here, there, *args)
        left = len(tally.missing())
        then = f"{left} shards of other parts are not done; when they are: --merge" if left else "next: --merge"
        raise Waiting(f"{self} of {tally.folder.name}: done; {then}")

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with at_work(self.locks), ExitStack() as held:
            for lock in self.locks:
                own = held.enter_context(open(f"{lock}-{self.part}-of-{self.parts}", "ab"))
                try:
                    fcntl.flock(own, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError as e:
                    raise InputError(f"{lock.parent}: another running process is working on {self}") from e
                if other := self._of_another_number(lock):
                    raise InputError(
                        f"{lock.parent}: part {other} is running and this is {self}, so that some shards would be done "
                        "by both: parts that run at the same time are of one number"
                    )
            yield

    def _of_another_number(self, lock: Path) -> str:
        """A running part of another number of parts; empty where there is none."""
        for path in sorted(lock.parent.glob(f"{lock.name}-*-of-*")):
            part, parts = path.name.removeprefix(f"{lock.name}-").split("-of-")
            if int(parts) != self.parts and _held(path):
                return f"{part}/{parts}"
        return ""

    def own(self, units: Sequence[int]) -> list[int]:
        """Those of this part."""
        return [u for u in units if u % self.parts == self.part - 1]

    def __str__(self) -> str:
        return f"part {self.part}/{self.parts}"


class Merging(Local):
    """An :class:`~mmsae.jobs.units.Engine` that merges what parts have done, and does no unit itself.

    Args:
        size: Processes on this machine that share what can be shared of the merge.
    """

    patient = False

    def __init__(self, size: int = 1) -> None:
        super().__init__(0)
        self.merged, self._writers = False, size

    def own(self, units: Sequence[int]) -> list[int]:
        """None."""
        return []

    def __exit__(self, kind: type | None = None, error: object = None, *where: object) -> bool:
        super().__exit__(kind, error, *where)
        return _told(error)

    def merge(self, done: Callable[[], bool], do: Callable[[], None]) -> None:
        """Do it, and know whether it was done before."""
        before = done()
        do()
        self.merged |= not before

    def deal(self, tally: Tally, todo: Sequence[int], here: Work, there: Callable[..., Work], *args: Any) -> None:
        """Do it on this machine."""
        self.size = self._writers
        super().deal(tally, todo, here, there, *args)
        self.size = 0

    def run(self, tally: Tally, todo: Sequence[int], here: Work, there: Callable[..., Work], *args: Any) -> None:
        """Say that there are units to do.

        Raises:
            Waiting: A pass before this one has just been merged.
            InputError: None has, so the merge is refused.
        """
        kind, n = tally.folder.name, len(tally.files)
        if self.merged:
            raise Waiting(f"merged what was there; next: the parts again, for {len(todo)} shards of {kind}")
        failed = list(tally.failed().values())
        names = ", ".join(tally.shards[u] for u in todo[:3]) + (", ..." if len(todo) > 3 else "")
        why = f"; {len(failed)} of them failed: {told(failed)}" if failed else ""
        raise InputError(
            f"{tally.folder}: {len(todo)} of {n} shards are not done, so there is nothing to merge: {names}{why}; "
            "run their parts again, then --merge"
        )


def _held(lock: Path) -> bool:
    """Whether a running process holds a lock for itself."""
    try:
        with open(lock, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:  # a merge has ended meanwhile
        return False
    except OSError:
        return True
    return False


def _told(error: object) -> bool:
    """Print what has to be done before the job can go on; whether that was why it ended."""
    if isinstance(error, Waiting):
        print(error, flush=True)
    return isinstance(error, Waiting)
