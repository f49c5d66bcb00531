"""Stages of a job that have names: each is done once, so that a killed job goes on with the one that it was in."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmsae.files import write_json

if TYPE_CHECKING:
    from mmsae.jobs.folder import JobFolder


class Stages:
    """Stages with a JSON file each, which is whole or not there.

    Args:
        folder: The job's folder.
        suffix: What follows a stage's name in the path of its file.
        progress: Whether to print what a stage took.
    """

    clock = time.process_time

    def __init__(self, folder: JobFolder, suffix: str = ".json", progress: bool = False) -> None:
        self.folder, self.suffix, self.progress = folder, suffix, progress

    def path(self, name: str) -> Path:
        """Where the file of a stage is."""
        return self.folder.work / f"{name}{self.suffix}"

    def done(self, name: str) -> bool:
        """Whether a stage is done."""
        return self.path(name).exists()

    def all_done(self, pattern: str) -> list[str]:
        """Names of the stages that are done, those of earlier runs too; ``pattern`` as ``arms/*``."""
        found = self.folder.work.glob(pattern + self.suffix)
        return sorted(p.relative_to(self.folder.work).as_posix().removesuffix(self.suffix) for p in found)

    def read(self, name: str) -> Any:
        """What the file of a stage holds."""
        return json.loads(self.path(name).read_text(encoding="utf-8"))

    def run(self, name: str, work: Callable[[], Any]) -> Any:
        """What ``work`` returned, now or earlier, as JSON gives it back."""
        if not self.done(name):
            start = self.clock()
            value = work()
            self._keep(name, round(self.clock() - start, 2), value)
        return self._value(name)

    def _keep(self, name: str, seconds: float, value: Any) -> None:
        write_json(self.path(name), {"seconds": seconds, "value": value})
        if self.progress:
            print(f"[{name}] {seconds:.0f} CPU-s", flush=True)

    def _value(self, name: str) -> Any:
        return self.read(name)["value"]


class StageLog(Stages):
    """Stages that leave their results elsewhere; the job's own file says which are done and how long they took.

    Attributes:
        seconds: ``{name: seconds}`` of the stages that are done, by the clock on the wall.
    """

    clock = time.perf_counter

    def __init__(self, folder: JobFolder) -> None:
        super().__init__(folder)
        self.seconds: dict[str, float] = folder.noted().get("seconds", {})

    def done(self, name: str) -> bool:
        """Whether a stage is done."""
        return name in self.seconds

    def run(self, name: str, work: Callable[[], Any]) -> None:
        """Do a stage unless it is done, and say so."""
        print(f"[{name}]" + (f" done before ({self.seconds[name]:.0f} s)" if self.done(name) else ""), flush=True)
        super().run(name, work)

    def _keep(self, name: str, seconds: float, value: Any) -> None:
        self.seconds[name] = seconds
        self.folder.note(seconds=self.seconds)

    def _value(self, name: str) -> None:
        return None
