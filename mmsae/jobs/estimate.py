"""What a job says before it begins and while it runs: how much there is to do, how long it takes, and how far it is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import Any, NamedTuple

from mmsae.shards import FaultLog, UnitBatch
from mmsae.shards.groups import groups
from mmsae.shards.shard import shard_size
from mmsae.types import ImageTextBatch


class Estimate(NamedTuple):
    """How much some tars are."""

    tars: int  #: Their number.
    done: int  #: Tars of the job that were done before.
    samples: int  #: About how many samples they hold.
    seconds: float | None  #: About how long they take; None where the first of them has no good sample.
    first: ImageTextBatch  #: The batch that was tried.
    made: Any  #: What was made of it.

    def __str__(self) -> str:
        before = f" ({self.done} done before)" if self.done else ""
        return f"{self.tars} shards{before}, about {self.samples} samples"

    def takes(self, devices: int, device: str) -> str:
        """``, about 12 min on 2 x cpu``, or nothing where that is not known."""
        return "" if self.seconds is None else f", about {duration(self.seconds)} on {devices} x {device}"


def estimate(
    paths: Sequence[str],
    done: int,
    stream: Callable[[], Iterator[UnitBatch]],
    try_out: Callable[[ImageTextBatch], Any],
    workers: int,
    devices: int,
) -> Estimate:
    """Count samples in the headers of at most four tars, and take the time of one batch.

    ``done`` tars were done before; ``stream`` gives the batches of the others, decoded in this process. ``try_out``
    does with a batch what the work does, and leaves nothing behind. ``workers`` decode for each of the ``devices``.
    """
    sample = paths[:: -(-len(paths) // 4)]
    counted = sum(1 for p in sample for _ in groups(p, FaultLog(), read=False))
    n = round(counted * sum(map(shard_size, paths)) / max(1, sum(map(shard_size, sample))))
    start = time.perf_counter()
    with closing(stream()) as batches:
        first = next(step.batch for step in batches)
    decode, seconds, made = time.perf_counter() - start, None, None
    if first.uids:
        for _ in range(2):  # the first pass allocates and compiles
            start = time.perf_counter()
            made = try_out(first)
        run = time.perf_counter() - start
        seconds = n / len(first.uids) / devices * (max(run, decode / workers) if workers else run + decode)
    return Estimate(len(paths), done, n, seconds, first, made)


def duration(seconds: float) -> str:
    """``40 s``, ``12 min``, ``3.1 h``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def progress_bar(what: str, unit: str, show: bool, total: int | None = None, done: int = 0) -> Any:
    """A bar of tqdm, which counts ``unit`` from ``done`` on; a context manager."""
    from tqdm import tqdm

    return tqdm(desc=what, unit=unit, disable=not show, total=total, initial=done)
