"""What a job says before it begins and while it runs: how much there is to do, how long it takes, and how far it is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from typing import Any, NamedTuple, TypeVar

from mmsae.errors import InputError
from mmsae.files import duration
from mmsae.shards import FaultLog, UnitBatch
from mmsae.shards.groups import groups
from mmsae.shards.shard import shard_size
from mmsae.types import ImageTextBatch

T = TypeVar("T")
SLOW = 0.05  #: Seconds for one sample, from which a whole batch would be long to wait for.
FEW = 4  #: Samples that are tried then.


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
    stream: Callable[[Sequence[str], int], Iterator[UnitBatch]],
    try_out: Callable[[ImageTextBatch], Any],
    batch_size: int,
    workers: int,
    devices: int,
    whole: bool = True,
) -> Estimate:
    """Count samples in the headers of at most four tars, and take the time of one batch.

    The first pass allocates and compiles, so it is the second that counts. Without ``whole`` the first is of one
    sample, and where that takes long, the second is of four: as fast a sample as a batch on a CPU, to a fifth or so.

    Args:
        paths: The tars that are to be done.
        done: Tars that were done before.
        stream: Gives the batches, of a size, of some of them, decoded in this process.
        try_out: Does with a batch what the work does, and leaves nothing behind.
        batch_size: Samples of the work's batches.
        workers: Processes that decode for each device.
        devices: Number of devices.
        whole: Try whole batches.

    Raises:
        InputError: None of the tars that were tried can be had; where some can, the work itself will name the others.
        OSError: The same, of files.
    """
    sample, counted = _readable(paths[:: -(-len(paths) // 4)])
    # a command's output has no size before it has run
    there, counted_of = (sum(shard_size(p) or 1 for p in some) for some in (paths, sample))
    n = round(counted * there / counted_of)
    stream = partial(stream, sample)
    first, decode = _first(stream, batch_size if whole else 1)
    seconds = made = None
    if first.uids:
        made, run = _timed(lambda: try_out(first))
        if not whole and batch_size > 1:
            first, decode = _first(stream, min(batch_size, FEW) if run > SLOW else batch_size)
        made, run = _timed(lambda: try_out(first))
        seconds = n / len(first.uids) / devices * (max(run, decode / workers) if workers else run + decode)
    return Estimate(len(paths), done, n, seconds, first, made)


def _readable(sample: Sequence[str]) -> tuple[list[str], int]:
    """Those of some tars whose headers can be read, and the number of their samples."""
    found, counted, error = [], 0, None
    for path in sample:
        try:
            counted += sum(1 for _ in groups(path, FaultLog(), read=False))
            found.append(path)
        except (InputError, OSError) as e:
            error = e
    if error is not None and not found:
        raise error
    return found, counted


def _first(stream: Callable[[int], Iterator[UnitBatch]], size: int) -> tuple[ImageTextBatch, float]:
    """The first batch of a size, and the seconds that its decoding took."""
    with closing(stream(size)) as batches:
        return _timed(lambda: next(step.batch for step in batches))


def _timed(do: Callable[[], T]) -> tuple[T, float]:
    start = time.perf_counter()
    made = do()
    return made, time.perf_counter() - start


def progress_bar(what: str, unit: str, show: bool, total: int | None = None, done: int = 0) -> Any:
    """A bar of tqdm, which counts ``unit`` from ``done`` on; a context manager."""
    from tqdm import tqdm

    return tqdm(desc=what, unit=unit, disable=not show, total=total, initial=done)
