"""The folder of a job: whose job it is, who leads it, and a result that is whole or not there.

While a job is under way ``job.json`` says what identifies it, so that the same command goes on after a kill and another
is refused. Some jobs work in ``OUT.partial`` and their result appears as a whole; others work in OUT itself.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from mmsae.files import disk_errors, write_json, write_new
from mmsae.jobs.tally import FAILED, JOB, LOCK, UNITS
from mmsae.jobs.units import Engine, Parts
from mmsae.types import InputError


def same_job(theirs: Mapping[str, Any], ours: Mapping[str, Any], what: str, but: Collection[str] = ()) -> None:
    """Refuse to mix two jobs.

    Args:
        theirs: What identifies the job that is there.
        ours: What identifies this one.
        what: Where it was found, as "FOLDER holds the result".
        but: Fields that may differ.

    Raises:
        InputError: Names the first field that differs, and both values.
    """
    for field in {**ours, **theirs}:
        if field not in but and theirs.get(field) != ours.get(field):
            raise InputError(
                f"{what} of another job: its {_differ(field, theirs.get(field), ours.get(field))}; choose another --out"
            )


def _differ(name: str, there: Any, here: Any) -> str:
    if isinstance(there, dict) and isinstance(here, dict):
        inner = next(k for k in {**here, **there} if there.get(k) != here.get(k))
        return _differ(inner if name == "job" else f"{name}.{inner}", there.get(inner), here.get(inner))
    if isinstance(there, list) and isinstance(here, list) and len(repr(there)) > 80:
        if len(there) != len(here):
            return f"{name} is of {len(there)} entries there and of {len(here)} here"
        i = next(i for i, pair in enumerate(zip(there, here, strict=True)) if pair[0] != pair[1])
        return _differ(f"{name}[{i}]", there[i], here[i])
    return f"{name} is {there!r} there and {here!r} here"


def stored_job(file: Path) -> dict[str, Any]:
    """What a ``job.json`` or the JSON of a result says of its job; empty where there is no such file."""
    found = _read(file)
    return found.get("job", found)


def begun_job(*files: Path) -> dict[str, Any]:
    """What the first of these files says of its job, the result's before the unfinished work's; empty where none is."""
    return next((job for job in map(stored_job, files) if job), {})


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


class JobFolder:
    """Where a job is done and where its result appears.

    Args:
        out: The result.
        job: What identifies the job; plain JSON values.
        command: Whose it is, for messages: ``mmsae filter``.
        result: The JSON file in OUT by which a finished result is known. It holds the job, as its ``job`` or among its
            own fields. Without one a job is never known to be finished, only its parts are.
        beside: Whether to work in ``OUT.partial``, so that OUT appears as a whole.
        writes: Names of what the job writes into an OUT that may hold other things; None: OUT is the job's alone.
        but: Fields that may differ between two runs of one job.
        file: Name of the file in the working folder that says whose job it is.
        key: Where in that file the job is; empty: its fields are the file's own.
        holds: What the file's folder holds, for messages.

    Attributes:
        out: The result's folder.
        work: The working folder.
        draft: Where a result that appears as a whole is put together.
        finished: Whether the result of this very job is there.

    Raises:
        InputError: One of the folders belongs to another job, or holds something else.
    """

    def __init__(
        self,
        out: str | Path,
        job: Mapping[str, Any],
        command: str,
        *,
        result: str = "",
        beside: bool = False,
        writes: Sequence[str] | None = None,
        but: Collection[str] = (),
        file: str = JOB,
        key: str = "",
        holds: str = "the unfinished work",
    ) -> None:
        self.out, self.command, self.writes, self.but = Path(out), command, writes, but
        self.work = self.out.with_name(self.out.name + ".partial") if beside else self.out
        self.draft, self.file, self.key, self.holds = self.work / "result", self.work / file, key, holds
        self.job = json.loads(json.dumps(dict(job)))
        self.finished = bool(result) and self._finished(self.out / result)
        if not self.finished:
            self._check()

    def _finished(self, file: Path) -> bool:
        if not file.exists():
            if self.work != self.out:
                self._refuse_foreign(self.out, "result")
            return False
        found = _read(file)
        theirs = found.get("job") or {k: found[k] for k in self.job if k in found}
        if not theirs:
            raise InputError(f"{self.out} exists and holds no result of {self.command}; choose another --out")
        same_job(theirs, self.job, f"{self.out} holds the result", self.but)
        if self.work != self.out and _read(self.file) == self.job:
            shutil.rmtree(self.work, ignore_errors=True)  # killed between the last two steps
        return True

    def _check(self) -> None:
        if self.file.exists():
            theirs = self.noted().get(self.key, {}) if self.key else self.noted()
            same_job(theirs, self.job, f"{self.work} holds {self.holds}", self.but)
        elif self.writes is None:
            self._refuse_foreign(self.work, "unfinished job" if self.work != self.out else "result")
        elif own := [name for name in self.writes if (self.out / name).exists()]:
            raise InputError(f"{self.out} has {own[0]}, which no {self.command} there wrote; choose another --out")

    def _refuse_foreign(self, folder: Path, what: str) -> None:
        if folder.is_file() or (folder.is_dir() and any(not half_written(p) for p in folder.iterdir())):
            raise InputError(f"{folder} exists and holds no {what} of {self.command}; choose another --out")

    def noted(self) -> dict[str, Any]:
        """What the job's file holds; empty where there is none."""
        return _read(self.file)

    def note(self, **more: Any) -> None:
        """Write the job's file, with ``more`` beside the job; not while it is locked."""
        write_json(self.file, self._whose() | more)

    def _whose(self) -> dict[str, Any]:
        return {self.key: self.job} if self.key else self.job

    def begin(self) -> BinaryIO:
        """Write the job's file where there is none, and open it: what is locked by those who work."""
        if not self.file.exists():
            with disk_errors(self.work):
                self.work.mkdir(parents=True, exist_ok=True)
                write_new(self.file, (json.dumps(self._whose(), indent=1, ensure_ascii=False) + "\n").encode())
        return open(self.file, "rb")

    @contextmanager
    def under(self, engine: Engine) -> Iterator[None]:
        """Work on the job as this process of an engine: lead it, or be one of the others.

        Raises:
            InputError: Another process leads it, or others work on it and the engine does not wait for them.
        """
        outer = engine.locks  # a job may be a step of another, and several be done in one pass
        engine.locks = (*outer, self.lock)
        try:
            if engine.lead:
                with self.lead(engine.patient):
                    yield
            else:
                self.begin().close()
                yield
        finally:
            engine.locks = outer

    @contextmanager
    def lead(self, patient: bool = True) -> Iterator[None]:
        """Be the one process that leads the job, and wait for what is left of the processes of a killed one.

        Raises:
            InputError: Another process leads it, or, where this one is not ``patient``, others work on it.
        """
        with self.begin() as mine:
            try:  # a lock dies with its process, so a killed job leaves none
                fcntl.flock(mine, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as e:
                raise InputError(f"{self.work}: another running process is working on this job") from e
            if self.lock.exists():
                with open(self.lock, "rb") as others:
                    try:
                        fcntl.flock(others, fcntl.LOCK_EX | (0 if patient else fcntl.LOCK_NB))
                    except OSError as e:
                        raise InputError(f"{self.work}: other running processes are working on this job") from e
            try:
                yield
                for lock in self.work.glob(f"{LOCK}*"):  # whoever held one has nothing left to do
                    lock.unlink(missing_ok=True)
            finally:
                self.discard()

    @property
    def lock(self) -> Path:
        """The file that processes hold which work on the job and do not lead it; see :func:`at_work`."""
        return self.work / LOCK

    def parts(self, paths: Sequence[str], kind: str = "parts", suffix: str = ".part") -> Parts:
        """The part files of some tars, in a folder of their own."""
        return Parts(self.work / kind, paths, suffix)

    def publish(self) -> Path:
        """The result takes its place; the working folder goes."""
        for path in [p for p in self.draft.rglob("*") if p.is_file() and (p.name.startswith(".") or _aside(p))]:
            path.unlink()
        os.replace(self.draft, self.out)
        shutil.rmtree(self.work)
        return self.out

    def discard(self, scraps: Sequence[str] = ()) -> None:
        """Remove a working folder in which nothing has been done yet; ``scraps`` are files and folders that do not
        count.
        """
        if not self.file.exists():
            return
        own = [self.work / name for name in (self.file.name, *scraps)]
        files = [p for p in self.work.rglob("*") if p.is_file() and not _aside(p)]
        if all(p in own or any(scrap in p.parents for scrap in own) for p in files):
            shutil.rmtree(self.work, ignore_errors=True)


@contextmanager
def at_work(locks: Sequence[Path]) -> Iterator[None]:
    """Mark jobs as being worked on by a process that does not lead them."""
    with ExitStack() as held:
        for lock in locks:
            fcntl.flock(held.enter_context(open(lock, "ab")), fcntl.LOCK_SH)
        yield


def _aside(path: Path) -> bool:
    """Whether a file is no work that was done: half-written, a lock, or what is known of a pass and its failures."""
    return half_written(path) or path.name.startswith(LOCK) or path.name == UNITS or path.name.endswith(FAILED)


def half_written(path: Path) -> bool:
    """Whether a file is what a killed process left of its writing."""
    return path.name.startswith(".") and ".tmp" in path.name
