"""``mmsae extract``: run a frozen host over image-text shards and store what it computes.

The unit of work is one tar. A killed job resumes after the last finished tar, and its result has the same bytes as that
of an uninterrupted one, whatever the number of workers or devices: rows of a matrix product depend in their last bits
on the batch they are computed in, and batches are cut from one tar only.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from contextlib import closing
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from tqdm import tqdm

from mmsae.activations.spec import DTYPES, StoreSpec, has_item_column, name_sites
from mmsae.activations.uids import SeenUids
from mmsae.activations.writer import PartWriter, StoreWriter, begun_job
from mmsae.files import free_bytes, nbytes
from mmsae.hosts import Host, Rows, load_host, pick_device
from mmsae.shards import FAULT_LIMIT, FaultLog, UnitBatch, expand, identity, shard_name, unit_batches
from mmsae.shards.tar import groups
from mmsae.types import ImageTextBatch, InputError, Site, Tokens


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


def host_batches(host: Host, writer: StoreWriter, plan: Plan, todo: Sequence[int], workers: int) -> Iterator[UnitBatch]:
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


def announce(host: Host, writer: StoreWriter, plan: Plan, devices: int) -> None:
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


_stop: Any = None  # in the processes of a job on several devices: an event, set when one of them has failed
_parent = 0  # there too: who started them


def extract(
    host: str | Host,
    shards: str | Sequence[str],
    out: str | Path,
    *,
    sites: str | Site | Sequence[str | Site] | Mapping[str, str | Site] | None = None,
    batch_size: int | None = None,
    workers: int | None = None,
    dtype: str = "float32",
    device: str = "auto",
    devices: int = 1,
    precision: str = "fp32",
    fault_limit: float = FAULT_LIMIT,
    caption_field: str = "",
    text: Literal["question", "question+answer"] = "question",
    progress: bool = True,
) -> Path:
    """Store a host's activations of all samples of some shards.

    Run again after a kill, it goes on; run again after it ended, it does nothing.

    Args:
        host: Name for :func:`mmsae.hosts.load_host` (an open_clip name, ``hf-hub:ID``, ``local-dir:DIR``,
            ``timm:NAME``, ``timm:local-dir:DIR``, ``lvlm:ID-or-FOLDER``, ``diffusers:ID-or-FOLDER``: captions), or a
            loaded host.
        shards: Path, folder, glob or brace pattern of tars, or several.
        out: The store to write.
        sites: Where to read; default: the embeddings of every modality of the host. ``image.embed``,
            ``text.pooled`` or ``MODULE.PATH:io[tokens]``; several per modality are stored from one forward pass.
        batch_size: Samples per forward pass; part of the job, because it changes last bits. Default: that of the job
            that is begun in ``out``, else 256, and on a CPU as many as have the area of 16 images of 224 pixels.
        workers: Decoding processes per device; default: the free cores, 8 at most. 0 decodes in the main process.
        dtype: ``float32`` (exact), ``bfloat16`` or ``float16`` (half the disk; a float16 overflow is refused).
        device: ``cpu``, ``cuda`` or ``auto``.
        devices: Number of devices (``cpu``: processes), one host on each; needs a host given by name.
        precision: ``fp32`` or ``bf16`` autocast of the host.
        fault_limit: Largest share of samples that may be unusable.
        caption_field: Field of the samples' json that holds the caption; empty: ``txt``, or json's ``caption``.
        text: Of vision-language hosts: ``question``: json's ``question`` (else the caption), the answer's turn empty;
            ``question+answer``: whole conversations.
        progress: Whether to print and show bars.

    Returns:
        The folder of the finished store.

    Raises:
        InputError: No shard matches, the folder holds another job, the disk is or will be full, a uid occurs twice,
            too many samples are unusable, or the host has no such site.
    """
    if (batch_size is not None and batch_size < 1) or devices < 1:
        raise InputError(f"batch size is {batch_size} and devices {devices}; both must be at least 1")
    if batch_size is None:
        batch_size = begun_job(out).get("batch_size", 0)  # 0: as the host has it, which is not loaded yet
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype}: a store holds one of {', '.join(DTYPES)}")
    paths = expand(shards)
    workers = min(8, max(0, (os.cpu_count() or 1) // devices - 1)) if workers is None else workers
    specs = [sites] if isinstance(sites, (str, Site)) else sites
    specs = None if specs is None else list(specs.values() if isinstance(specs, Mapping) else specs)
    plan = Plan(paths, str(out), specs, batch_size, workers, dtype, fault_limit, caption_field, progress, text)
    if devices > 1 and not isinstance(host, str):
        raise InputError(f"devices is {devices}, but a host that is loaded already runs on 1; give the host's name")
    loaded = _load(host, device, precision, 0)
    plan = plan if plan.batch_size else plan._replace(batch_size=loaded.batch_size())
    writer = _writer(loaded, plan)
    if writer.finished:
        if progress:
            print(f"{out}: finished before, {StoreSpec.load(out).items} items; nothing to do")
        return writer.folder
    try:
        announce(loaded, writer, plan, devices)
        todo = writer.missing()
        if devices == 1 or len(todo) < 2:
            _work(loaded, writer, plan, todo, lead=True)
        else:
            loaded.to("cpu")  # its memory belongs to the processes now
            _spawn(host, device, precision, plan, todo, min(devices, len(todo)))
        return _merge(writer, plan)
    finally:
        if not writer.finished and len(writer.missing()) == writer.units:
            writer.discard()


def _load(host: str | Host, device: str, precision: str, rank: int) -> Host:
    if not isinstance(host, str):
        return host
    return load_host(host, device=pick_device(device, rank), precision=precision)


def _writer(host: Host, plan: Plan) -> StoreWriter:
    sites = name_sites([host.site(s) for s in plan.sites or host.default_sites().values()])
    job = {
        "host": host.fingerprint,
        "precision": host.precision,
        "device": torch.device(host.device).type,
        "batch_size": plan.batch_size,
        "caption_field": plan.caption_field,
        "shards": identity(plan.paths),
    }
    if plan.text != "question":  # stores that were begun before there was a choice go on
        job["text"] = plan.text
    return StoreWriter(plan.out, sites, dtype=plan.dtype, units=len(plan.paths), job=job)


def _work(host: Host, writer: StoreWriter, plan: Plan, todo: list[int], lead: bool) -> None:
    """Write the parts of this process's tars; the leading process shows its progress."""
    unit_of = {plan.paths[u]: u for u in todo}
    log, seen, parts, done = FaultLog(), SeenUids(writer), {}, 0
    bar = tqdm(desc="extract", unit="sample", disable=not (plan.progress and lead))
    with bar, closing(host_batches(host, writer, plan, todo, plan.workers)) as stream:
        try:
            for path, batch, last, _ in stream:
                if _stop is not None and (_stop.is_set() or os.getppid() != _parent):
                    return  # the job failed elsewhere, or was killed
                if path not in parts:
                    parts[path] = writer.open_part(unit_of[path], shard_name(path))
                _add(parts[path], host, batch, log)
                bar.update(len(batch.uids))
                if last:
                    seen.check(parts[path])  # now, not hours later in the merge
                    parts[path].commit()
                    parts.pop(path).close()
                    done += 1
                    bar.set_postfix(tars=f"{done}/{len(todo)}", dropped=log.dropped)
                log.check(plan.fault_limit)
        finally:
            for part in parts.values():
                part.close()


def _add(part: PartWriter, host: Host, batch: ImageTextBatch, log: FaultLog) -> None:
    faults = FaultLog()
    faults.merge(batch.faults)
    if batch.uids:
        sites = part.store.sites
        rows = {n: _to_cpu(r) for n, r in zip(sites, host.read(batch, list(sites.values())), strict=True)}
        bad = torch.zeros(len(batch.uids), dtype=torch.bool)
        for r in rows.values():
            bad[r.item[~r.x.isfinite().all(1)]] = True
        for i in bad.nonzero()[:, 0].tolist():
            faults.add("not_finite", batch.shards[i], batch.keys[i], "the host gave inf or nan")
        good = (~bad).nonzero()[:, 0].tolist()
        uids, keys, captions = ([column[i] for i in good] for column in (batch.uids, batch.keys, batch.captions))
        rows = {n: _keep(r, ~bad) for n, r in rows.items()} if bad.any() else rows
        x, item, position, special = (
            {n: getattr(r, f) for n, r in rows.items() if getattr(r, f) is not None} for f in Rows._fields
        )
        part.add(Tokens(x, item, uids, position, special), uids, keys, captions)
    log.merge(taken := faults.take())
    part.fault(taken)


def _to_cpu(rows: Rows) -> Rows:
    return Rows(*(None if t is None else t.cpu() for t in rows))


def _keep(rows: Rows, good: torch.Tensor) -> Rows:
    """The rows of good items, items renumbered without gaps."""
    keep = good[rows.item]
    kept = Rows(*(None if t is None else t[keep] for t in rows))
    return kept._replace(item=(good.cumsum(0) - 1)[kept.item])


def _spawn(host: str, device: str, precision: str, plan: Plan, todo: list[int], devices: int) -> None:
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    stop = context.Event()
    with ProcessPoolExecutor(devices, context, _remember, (stop,)) as pool:
        # dealt out here: what is missing changes as soon as the first process works
        jobs = [pool.submit(_rank, host, device, precision, plan, todo[r::devices], r) for r in range(devices)]
        failed = next((j.exception() for j in wait(jobs, return_when=FIRST_EXCEPTION).done if j.exception()), None)
        if failed:
            stop.set()
    if failed:
        raise failed


def _remember(stop: Any) -> None:
    global _stop, _parent
    _stop, _parent = stop, os.getppid()


def _rank(host: str, device: str, precision: str, plan: Plan, todo: list[int], rank: int) -> None:
    loaded = _load(host, device, precision, rank)
    _work(loaded, _writer(loaded, plan), plan, todo, lead=rank == 0)


def _merge(writer: StoreWriter, plan: Plan) -> Path:
    log = FaultLog()
    for faults in writer.faults():
        log.merge(faults)
    log.check(plan.fault_limit, final=True)
    folder = writer.finish()
    if plan.progress:
        spec = StoreSpec.load(folder)
        print(log.summary())
        print(f"{spec.items} items, {nbytes(spec.nbytes)} in {len(spec.shards)} shards: {folder}")
    return folder


def extract_command(
    host: str, shards: str | list[str], out: str, sites: str | list[str] | None = None, **options: Any
) -> Path:
    """Store a host's activations of all samples of some shards; see :func:`mmsae.activations.extract`.

    Args:
        host: An open_clip name with its weights (``ViT-B-32/laion2b_s34b_b79k``), ``hf-hub:ID``, ``local-dir:DIR``,
            ``timm:NAME``, ``timm:local-dir:DIR``, ``lvlm:ID-or-FOLDER``, or ``diffusers:ID-or-FOLDER`` (its text
            encoders, on captions).
        shards: Path, folder, glob or brace pattern of tars, or several.
        out: The store to write.
        sites: Where to read; default: the embeddings of every modality of the host. ``image.embed``, ``text.pooled``
            or ``MODULE.PATH:io[tokens]``, or several.
        **options: The other arguments of ``extract``.

    Returns:
        The folder of the finished store.
    """
    return extract(host, shards, out, sites=sites, **options)
