"""Which units of a pass are done, which failed and why: files beside the parts, which ``mmsae status`` reads."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mmsae.errors import EndsJob, InputError, out_of_memory
from mmsae.files import disk_errors, write_new, write_whole

JOB, LOCK = "job.json", "workers.lock"  #: Whose job a folder is; what those that work on it hold.
UNITS, FAILED = "units.json", ".failed"
TRIED = 3  #: Units that may fail before any is done; then it is no unit's fault.
TOLD = 5  #: Failures that one sentence names.


class UnitsFailed(InputError):
    """Some units failed and the others are done; the sentence names them."""


class Waiting(Exception):
    """What this process can do is done; the sentence says what has to be done before the job can go on."""


class Failure(NamedTuple):
    """A unit that failed."""

    shard: str  #: Its shard.
    error: str  #: The sentence of the error.


class Tally(NamedTuple):
    """The units of one pass of a job; plain values, so that it travels to other processes."""

    folder: Path  #: Where the part files are.
    shards: list[str]  #: The shard of each unit, as it was given.
    files: list[str]  #: Name of the part file of each unit.
    also: tuple[Tally, ...] = ()  #: Passes of other jobs over the same shards, whose parts are made along with these.

    def done(self, unit: int) -> bool:
        """Whether the part of a unit is there, in all passes that are made together."""
        return (self.folder / self.files[unit]).exists() and all(t.done(unit) for t in self.also)

    def missing(self) -> list[int]:
        """The units whose part is not there."""
        return [u for u in range(len(self.files)) if not self.done(u)]

    def note(self) -> None:
        """Write down which units there are, for who looks at the folder; every process of a job writes the same."""
        if not (self.folder / UNITS).exists():
            with disk_errors(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                write_new(self.folder / UNITS, _json({"shards": self.shards, "files": self.files}))
        for other in self.also:
            other.note()

    @classmethod
    def read(cls, noted: Path) -> Tally:
        """The tally of a folder in which one was noted."""
        found = json.loads(noted.read_text(encoding="utf-8"))
        return cls(noted.parent, found["shards"], found["files"])

    def _mark(self, unit: int) -> Path:
        return self.folder / (self.files[unit] + FAILED)

    def fail(self, unit: int, error: str) -> Failure:
        """Write down that a unit failed, and why."""
        for other in self.also:
            other.fail(unit, error)
        with disk_errors(self.folder):
            write_whole(self._mark(unit), _json((failure := Failure(self.shards[unit], error))._asdict()))
        return failure

    def clear(self, unit: int) -> None:
        """Forget that a unit failed, now that it is done."""
        self._mark(unit).unlink(missing_ok=True)
        for other in self.also:
            other.clear(unit)

    def failed(self) -> dict[int, Failure]:
        """``{unit: failure}`` of those that failed the last time and are not done since."""
        marks = {p.name for p in self.folder.glob(f"*{FAILED}")}
        found = [u for u, name in enumerate(self.files) if name + FAILED in marks and not self.done(u)]
        return {u: Failure(**json.loads(self._mark(u).read_text(encoding="utf-8"))) for u in found}


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=0, ensure_ascii=False) + "\n").encode()


def told(failures: Sequence[Failure]) -> str:
    """``a.tar: its error; b.tar: its error``, the first few."""
    more = f"; and {len(failures) - TOLD} more" if len(failures) > TOLD else ""
    return (
        "; ".join(f.error if f.error.startswith(f.shard) else f"{f.shard}: {f.error}" for f in failures[:TOLD]) + more
    )


def said(error: BaseException) -> str:
    """The sentence of an error."""
    return str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"


def hopeless(failures: Sequence[Failure], done: int) -> bool:
    """Whether so many units failed before any was done that the fault is not theirs."""
    return done == 0 and len(failures) >= TRIED


def report(failures: Sequence[Failure], units: Sequence[int], tally: Tally, cause: Exception | None = None) -> None:
    """End a pass of which some of these units failed.

    Raises:
        UnitsFailed: There are failures.
    """
    if not failures:
        return
    done = sum(map(tally.done, units))
    left = len(units) - done - len(failures)
    others = "the others are done" if done else "none is done"
    if left:
        others = f"{done} are done, and {left} were not tried, since none was done when {TRIED} had failed"
    raise UnitsFailed(
        f"{len(failures)} of {len(units)} shards failed, {others}; the same command tries them again: {told(failures)}"
    ) from cause


def go_on(work: Callable[[list[int]], None], units: Sequence[int], tally: Tally) -> None:
    """Do some units by ``work``; where one fails, write that down and go on with the others.

    An error does not say which of the units that are read side by side it is of. So the first that is not done is done
    alone then, and the others together again.

    Raises:
        UnitsFailed: Some failed; the others are done, unless the first few all failed.
        EndsJob: Something that all would meet.
    """
    left, failures, cause = list(units), [], None
    while left:
        todo = left
        try:
            work(todo)
            break
        except EndsJob:
            raise
        except Exception as e:
            left, error = [u for u in todo if not tally.done(u)], e
        if not left:
            raise error  # every unit is done, so it is of none of them
        first, *left = left
        if len(todo) > 1:
            error = _alone(work, first)
        if error is not None:
            failures.append(tally.fail(first, said(error)))
            if not isinstance(error, InputError) and not out_of_memory(error):  # a fault of code, whose place is wanted
                traceback.print_exception(error)
            cause = error
        if hopeless(failures, len(tally.files) - len(tally.missing())):
            break
    report(failures, units, tally, cause)


def _alone(work: Callable[[list[int]], None], unit: int) -> Exception | None:
    try:
        work([unit])
    except EndsJob:
        raise
    except Exception as e:
        return e
    return None
