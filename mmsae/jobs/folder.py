"""The folder of a filter job: ``OUT.partial`` while it runs, ``OUT`` once it is whole, and whose job either is."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmsae.files import atomic_file
from mmsae.types import InputError

RESULTS = "results.json"


class JobFolder:
    """Where a job is done and where its result appears.

    Args:
        out: The result.
        job: What identifies the job; plain JSON values.

    Attributes:
        result: The result's folder.
        work: The working folder beside it.
        draft: Where the result is put together.

    Raises:
        InputError: Either folder belongs to another job, or to something else.
    """

    def __init__(self, out: str | Path, job: Mapping[str, Any]) -> None:
        self.result = Path(out)
        self.work = self.result.with_name(self.result.name + ".partial")
        self.draft = self.work / "result"
        self.file = self.work / "job.json"
        self.job = json.loads(json.dumps(dict(job)))
        self.finished = self._finished()

    @staticmethod
    def begun(out: str | Path) -> dict[str, Any]:
        """What identifies the job whose result, or unfinished work, lies at ``out``; empty where there is none."""
        work = Path(out).with_name(Path(out).name + ".partial")
        for file, field in ((Path(out) / RESULTS, "job"), (work / "job.json", None)):
            try:
                found = json.loads(file.read_text())
                return dict(found if field is None else found[field])
            except (OSError, ValueError, KeyError, TypeError):
                continue
        return {}

    def _finished(self) -> bool:
        if not self.result.exists() or (self.result.is_dir() and not any(self.result.iterdir())):
            return False
        try:
            theirs = json.loads((self.result / RESULTS).read_text())["job"]
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise InputError(f"{self.result} exists and holds no result of mmsae filter; choose another --out") from e
        self._same(theirs, self.result, "the result")
        if self.file.exists() and json.loads(self.file.read_text()) == self.job:
            shutil.rmtree(self.work)  # killed between the last two steps
        return True

    def open(self) -> None:
        """Begin the job, or go on with it."""
        if self.file.exists():
            self._same(json.loads(self.file.read_text()), self.work, "the unfinished work")
            return
        if self.work.exists() and any(not p.name.startswith(".job.json") for p in self.work.iterdir()):
            raise InputError(f"{self.work} exists and holds no unfinished job of mmsae filter; choose another --out")
        with atomic_file(self.file) as temp:
            temp.write_text(json.dumps(self.job, indent=1))

    def _same(self, theirs: Mapping[str, Any], folder: Path, what: str) -> None:
        for field in self.job | dict(theirs):
            a, b = theirs.get(field), self.job.get(field)
            if a != b:
                long = isinstance(a, list) and isinstance(b, list)
                how = f"of {len(a)} and here of {len(b)} entries" if long else f"{a!r} there and {b!r} here"
                raise InputError(f"{folder} holds {what} of another job: its {field} is {how}; choose another --out")

    def publish(self) -> Path:
        """The result takes its place; the working folder goes."""
        for name in (p for p in self.draft.rglob(".*") if p.is_file()):  # of killed processes
            name.unlink()
        os.replace(self.draft, self.result)
        shutil.rmtree(self.work)
        return self.result

    def discard(self) -> None:
        """Remove a working folder in which nothing has been done yet."""
        if not any(p.is_file() and p != self.file for p in self.work.rglob("*")):
            shutil.rmtree(self.work, ignore_errors=True)
