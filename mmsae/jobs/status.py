"""How far a job is, from its folder alone: no host is loaded, and nothing is changed."""

from __future__ import annotations

import time
from pathlib import Path
from typing import NamedTuple

from mmsae.errors import InputError
from mmsae.files import duration
from mmsae.jobs.tally import JOB, UNITS, Failure, Tally

RESULTS = ("results.json", "weights.json", "evidence.json", "spec.json")
"""Files by which a finished result is known."""
LAST = 50  #: Parts whose times say how fast it goes.


class PassStatus(NamedTuple):
    """How far one pass over the shards is."""

    name: str  #: Its folder in that of the job.
    units: int  #: Shards that there are.
    done: int  #: Those that are done.
    failed: list[Failure]  #: Those that failed the last time.
    per_hour: float | None  #: How many were done in an hour of late; None where too few were to know.

    @property
    def missing(self) -> int:
        """Shards that are neither done nor failed."""
        return self.units - self.done - len(self.failed)

    @classmethod
    def of(cls, name: str, tally: Tally) -> PassStatus:
        """As its folder says."""
        missing = tally.missing()
        left = set(missing)
        times = sorted((tally.folder / f).stat().st_mtime for u, f in enumerate(tally.files) if u not in left)[-LAST:]
        span = times[-1] - times[0] if times else 0
        failed = list(tally.failed().values())
        return cls(name, len(tally.files), len(tally.files) - len(missing), failed,
                   (len(times) - 1) / span * 3600 if span > 0 else None)  # fmt: skip

    def __str__(self) -> str:
        said = (
            f"{self.name}: {self.done} of {self.units} shards done, {self.missing} missing, {len(self.failed)} failed"
        )
        if self.per_hour and self.done < self.units:
            left = duration((self.units - self.done) / self.per_hour * 3600)
            said += f"; {self.per_hour:.3g} an hour, so {left} at this pace"
        return said


class JobStatus(NamedTuple):
    """How far a job is."""

    out: Path  #: Its result.
    work: Path  #: Where it is under way.
    passes: list[PassStatus]  #: Its passes that have begun and whose parts are still needed.
    finished: bool  #: Whether the result is there.

    @property
    def next(self) -> str:
        """What is to be done."""
        if self.finished:
            return "nothing: it is finished"
        if not self.passes:
            return "the same command again, with or without --part"
        if all(p.done == p.units for p in self.passes):
            return "the same command with --merge, or without --part"
        return "the same command again, with or without --part; then --merge where there are parts"

    def __str__(self) -> str:
        lines = [f"{self.out}: " + ("finished" if self.finished else f"not finished, {_age(self.work)}")]
        for p in self.passes:
            lines += [f"  {p}", *(f"    failed: {f.shard}: {f.error}" for f in p.failed)]
        return "\n".join([*lines, f"next: {self.next}"])


def job_status(out: str | Path) -> JobStatus:
    """How far the job of a result is.

    Raises:
        InputError: No job has begun there.
    """
    out = Path(out)
    work = next((w for w in (out.with_name(f"{out.name}.partial"), out) if w.is_dir()), None)
    if work is None:
        raise InputError(f"{out} is not there, nor {out.name}.partial: no job has begun")
    noted = sorted(work.rglob(UNITS), key=lambda p: p.stat().st_mtime)
    names = [work.name if p.parent == work else p.parent.relative_to(work).as_posix() for p in noted]
    passes = [PassStatus.of(n, Tally.read(p)) for n, p in zip(names, noted, strict=True)]
    whole = all(p.done == p.units for p in passes)
    finished = work == out and whole and any((out / f).exists() for f in RESULTS)
    if not (finished or passes or (work / JOB).exists()):
        raise InputError(f"{work} holds no job that goes shard by shard, or one of an earlier version")
    return JobStatus(out, work, passes, finished)


def _age(work: Path) -> str:
    newest = max((p.stat().st_mtime for p in work.rglob("*") if p.is_file()), default=work.stat().st_mtime)
    return f"last written {duration(max(0.0, time.time() - newest))} ago"
