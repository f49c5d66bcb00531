"""What an extraction will do: its parameters, its batches, and an estimate of disk and time before it starts."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import NamedTuple

import torch

from mmsae.backbones import Backbone
from mmsae.cache.spec import DTYPES, has_item_column
from mmsae.cache.writer import StoreWriter
from mmsae.files import free_bytes, nbytes
from mmsae.shards import FaultLog, UnitBatch, unit_batches
from mmsae.shards.tar import groups
from mmsae.types import InputError, Site


class Plan(NamedTuple):
    """What one process needs to know; plain values, so that it travels to other processes.

    Attributes:
        paths: All tars.
        out: The store.
        sites: Site specs, or None for the host's own defaults.
        batch_size: Samples per batch.
        workers: Decoding processes per device.
        dtype: Of the stored activations.
        fault_limit: Share of dropped samples that is tolerated.
        caption_field: Field of json with the caption.
        progress: Whether to show bars and print.
        text: What vision-language hosts read of a sample.
    """

    paths: list[str]
    out: str
    sites: list[str | Site] | None
    batch_size: int
    workers: int
    dtype: str
    fault_limit: float
    caption_field: str
    progress: bool
    text: str = "question"


def host_batches(
    host: Backbone, writer: StoreWriter, plan: Plan, todo: Sequence[int], workers: int
) -> Iterator[UnitBatch]:
    """Batches of some tars of the job, as the host wants them."""
    modalities = {s.modality for s in writer.sites.values()}
    return unit_batches(
        [plan.paths[u] for u in todo],
        batch_size=plan.batch_size,
        workers=workers,
        caption_field=plan.caption_field,
        unique=False,
        **host.reading(modalities, plan.text),
    )


def announce(host: Backbone, writer: StoreWriter, plan: Plan, devices: int) -> None:
    """Say what will be done, how much disk it takes and about how long, and refuse what will not fit.

    The number of samples is counted in the headers of at most four tars, the time is that of one batch.
    """
    todo = writer.missing()
    paths = [plan.paths[u] for u in todo]
    if not paths:
        return
    sample = paths[:: -(-len(paths) // 4)]
    counted = sum(1 for p in sample for _ in groups(p, FaultLog(), read=False))
    n = round(counted * sum(map(os.path.getsize, paths)) / max(1, sum(map(os.path.getsize, sample))))
    start = time.perf_counter()
    with closing(host_batches(host, writer, plan, todo, 0)) as stream:
        first = next(step.batch for step in stream)
    if not first.uids:
        return  # the first tar has no good sample: the work itself will say why
    decoded = time.perf_counter()
    rows = host.read(first, list(writer.sites.values()))  # the first pass allocates and compiles
    warm = time.perf_counter()
    host.read(first, list(writer.sites.values()))
    decode, run = decoded - start, time.perf_counter() - warm
    batches = n / len(first.uids) / devices
    seconds = batches * (max(run, decode / plan.workers) if plan.workers else run + decode)
    per_item = 100  # uid, key and caption, compressed
    for r, site in zip(rows, writer.sites.values(), strict=True):
        row = site.width * DTYPES[plan.dtype].itemsize + (9 if has_item_column(site) else 0)
        per_item += row * len(r.x) / len(first.uids)
    largest = max(map(os.path.getsize, paths)) / max(1, sum(map(os.path.getsize, paths)))
    # a tar's part lies on the disk twice while its columns are joined
    writer.needed = round(n * per_item * (1 + largest * devices * max(1, plan.workers)))
    free = free_bytes(writer.folder)
    if plan.progress:
        done = f" ({writer.units - len(todo)} done before)" if len(todo) < writer.units else ""
        print(f"extract {', '.join(map(str, writer.sites.values()))}")
        print(
            f"  {len(todo)} shards{done}, about {n} samples: {nbytes(n * per_item)} of {plan.dtype} in {writer.folder} "
            f"({nbytes(free)} free), about {_duration(seconds)} on {devices} x {torch.device(host.device)}"
        )
    if writer.needed > free:
        raise InputError(
            f"{writer.folder}: about {nbytes(writer.needed)} are needed and {nbytes(free)} are free; make room"
            + (", or store float16 or bfloat16" if plan.dtype == "float32" else "")
        )


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
