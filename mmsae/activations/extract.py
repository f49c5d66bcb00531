"""A host's activations of all samples of some shards, as an activation store.

The unit of work is one tar. A killed job resumes after the last finished tar, and its result has the same bytes as that
of an uninterrupted one, whatever the number of workers or devices: rows of a matrix product depend in their last bits
on the batch they are computed in, and batches are cut from one tar only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from mmsae.activations.duplicates import drop_duplicates
from mmsae.activations.spec import DTYPES, JOB_FILE, SPEC_FILE, StoreSpec, has_item_column, name_sites
from mmsae.activations.uids import SeenUids
from mmsae.activations.writer import PartWriter, StoreWriter
from mmsae.files import free_bytes, nbytes
from mmsae.hosts import Host, Rows, load_host, pick_device
from mmsae.hosts.gradient import reading
from mmsae.jobs.engines import engine_of
from mmsae.jobs.estimate import estimate
from mmsae.jobs.folder import LOCK, begun_job
from mmsae.jobs.units import Engine, Share, TarWork, Work, missing, work_tars
from mmsae.options import ListedData, Run, Spread, at_least, side_by_side
from mmsae.shards import FaultLog, UidList, UnitBatch, decoder, expand, identity, shard_name, shard_size, unit_batches
from mmsae.types import ImageTextBatch, InputError, Site


@side_by_side
def extract(
    host: str | Host,
    shards: str | Sequence[str],
    out: str | Path,
    *,
    sites: str | Site | Sequence[str | Site] | Mapping[str, str | Site] | None = None,
    dtype: str = "float32",
    text: Literal["question", "question+answer"] = "question",
    gradient: str = "",
    resize: Literal["host", "device"] = "host",
    spread: Spread = Spread(),
    run: Run = Run(),
    data: ListedData = ListedData(),
    engine: Engine | None = None,
) -> Path | None:
    """Store a host's activations of all samples of some shards.

    Run again after a kill, it goes on; run again after it ended, it does nothing. The batch size is part of the job,
    because it changes last bits; where none is given, a job goes on with the one that it was begun with.

    Args:
        host: Name for :func:`mmsae.hosts.load_host`, or a loaded host.
        shards: Path, folder, glob or brace pattern of tars, parquet files or images, here or at a URL, or several
            (docs/how-to/data.md).
        out: The store to write.
        sites: Where to read; default: the embeddings of every modality of the host. ``image.embed``,
            ``text.pooled`` or ``MODULE.PATH:io[tokens]``; several per modality are stored from one forward pass.
        dtype: ``float32`` (exact), ``bfloat16`` or ``float16`` (half the disk; a float16 overflow is refused).
        text: What vision-language hosts read: ``question``: json's ``question`` (else the caption), the answer's turn
            empty; ``question+answer``: whole conversations.
        gradient: Loss of the host whose gradient at every row is stored beside it: ``contrastive`` (image-text hosts; a
            batch holds the negatives, so its size matters), ``classifier`` (the host's own head; samples need ``cls``),
            ``lm`` (vision-language hosts) or ``diffusion`` (text-to-image hosts like Stable Diffusion 1.x).
        resize: ``host``: by the host's own transform; ``device``: on the host's device, which has other bits. The first
            batch is compared with the host's own transform, and what is too far from it is refused.
        spread: Who does the work; its fields may stand side by side, as ``devices=2``. More than this process needs a
            host given by name.
        run: Where and how the host computes, likewise.
        data: What is made of the samples' files, likewise.
        engine: Who does the work, where that is there already; each of its processes calls this with all arguments.

    Returns:
        The folder of the finished store; None where other parts of the job have to go on.

    Raises:
        InputError: No shard matches, the folder holds another job, the disk is or will be full, a uid occurs twice
            (unless ``data.duplicates`` is ``drop``), too many samples are unusable, or the host has no such site.
    """
    at_least(1, batch_size=run.batch_size)
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype}: a store holds one of {', '.join(DTYPES)}")
    if gradient and dtype == "float16":
        raise InputError(
            f"dtype is {dtype} and gradient {gradient}: gradients underflow in it, store bfloat16 or float32"
        )
    paths = expand(shards)
    specs = [sites] if isinstance(sites, (str, Site)) else sites
    specs = None if specs is None else list(specs.values() if isinstance(specs, Mapping) else specs)
    if not isinstance(host, str) and (spread.engine != "processes" or (spread.devices or 1) > 1):
        who = f"devices is {spread.devices}" if spread.engine == "processes" else f"engine is {spread.engine}"
        raise InputError(f"{who}, but a host that is loaded already runs on 1; give the host's name")
    with engine_of(spread, run, engine) as engine:
        loaded = _load(host, run, engine.rank)
        asked = begun_job(*(Path(out) / f for f in (SPEC_FILE, JOB_FILE))).get("batch_size", 0)
        batch_size = run.batch_size or asked or loaded.batch_size()
        workers = engine.decoders(run.workers)
        keep = UidList.of(data.keep)
        job = Extraction(paths, str(out), specs, dtype, text, gradient, resize, batch_size, workers, run, data, keep)
        return job.run(engine, loaded, host)
    return None


def _elsewhere(rank: int, host: str, job: Extraction) -> Work:
    """What does a process's tars, in a process that has loaded nothing."""
    loaded = _load(host, job.how, rank)
    return job.worker(loaded, job.writer(loaded))


class Extraction(NamedTuple):
    """What one process needs to know; plain values, so that it travels to other processes."""

    paths: list[str]  #: All tars.
    out: str  #: The store.
    sites: list[str | Site] | None  #: Site specs, or None for the host's own defaults.
    dtype: str  #: Type of the stored activations.
    text: str  #: What vision-language hosts read of a sample.
    gradient: str  #: Name of the loss that is differentiated; empty: none.
    resize: str  #: Who resizes images: ``host`` (its transform) or ``device``.
    batch_size: int  #: Samples per batch.
    workers: int  #: Decoding processes per device.
    how: Run  #: Where and how the host computes.
    data: ListedData  #: What is made of the samples' files.
    keep: UidList | None = None  #: The uids that are used.

    def run(self, engine: Engine, loaded: Host, host: str | Host) -> Path:
        """Do the job, or what is left of it, in each process of an engine."""
        writer, say = self.writer(loaded), self.how.progress and engine.lead
        if writer.finished:
            if say:
                print(f"{self.out}: finished before, {StoreSpec.load(self.out).items} items; nothing to do")
            return writer.folder
        engine.locks, tally = (writer.folder / LOCK,), writer.tally._replace(shards=list(self.paths))
        try:
            if todo := missing(engine, tally):
                if own := engine.own(todo):
                    self.announce(loaded, writer, own, min(engine.size, len(own)))
                if engine.elsewhere(len(todo)):
                    loaded.to("cpu")  # its memory belongs to the processes now
                engine.run(tally, todo, self.worker(loaded, writer), _elsewhere, host, self)
            engine.merge(lambda: False, lambda: self.finish(writer))
            return writer.folder
        finally:
            if engine.lead and not writer.finished and len(writer.missing()) == writer.units:
                writer.discard()

    def writer(self, host: Host) -> StoreWriter:
        """The store, for a host that is loaded."""
        sites = name_sites([host.site(s) for s in self.sites or host.default_sites().values()])
        job = {
            "host": host.fingerprint,
            "precision": host.precision,
            "device": torch.device(host.device).type,
            "batch_size": self.batch_size,
            "caption_field": self.data.caption_field,
            "shards": identity(self.paths),
        }
        if self.text != "question":  # stores that were begun before there was a choice go on
            job["text"] = self.text
        if self.gradient:
            host.objective(self.gradient)  # refuses what the host has not, before anything is written
            job["gradient"] = self.gradient
        if self.resize != "host":
            _unsized(host)  # refuses a transform that the device cannot do
            job["resize"] = self.resize
        if self.keep is not None:
            job["keep"] = self.keep.hash
        return StoreWriter(self.out, sites, dtype=self.dtype, units=len(self.paths), job=job)

    def batches(
        self, host: Host, writer: StoreWriter, workers: int, paths: Sequence[str], size: int
    ) -> Iterator[UnitBatch]:
        """Batches of some tars, as the host wants them; ``size`` samples each."""
        made = reading(host, {s.modality for s in writer.sites.values()}, self.text, self.gradient)
        if self.resize == "device" and made["transform"] is not None:
            made["transform"] = _unsized(host)
        options = {"batch_size": size, "caption_field": self.data.caption_field, "unique": False, "keep": self.keep}
        options["pin_memory"] = host.device.type == "cuda"
        return unit_batches(list(paths), workers=workers, **options, **made)

    def announce(self, host: Host, writer: StoreWriter, todo: Sequence[int], devices: int) -> None:
        """Say what will be done, how much disk it takes and about how long, and refuse what will not fit.

        A part of a batch queue is judged by its own shards, as it does not know which others are running.
        """
        paths, sites = [self.paths[u] for u in todo], list(writer.sites.values())
        stream = partial(self.batches, host, writer, 0)
        read = partial(host.read, sites=sites, gradient=self.gradient)
        # what a device makes of pixels is judged on a whole batch, see below
        whole = host.device.type != "cpu" or self.resize == "device"
        done = writer.units - len(writer.missing())
        about = estimate(paths, done, stream, read, self.batch_size, self.workers, devices, whole)
        if about.made is None:
            return  # the first tar has no good sample: the work itself will say why
        if about.first.inputs is not None and self.resize == "device":
            from mmsae.hosts.encoders.pixels import Agreement

            agreement = Agreement.of(host, about.first.inputs)
            agreement.check()
            if self.how.progress:
                print(f"resize on {host.device}, beside the host's own transform: {agreement}")
        samples = about.samples if self.keep is None else min(about.samples, len(self.keep))
        per_item = 100  # uid, key and caption, compressed
        for r, site in zip(about.made, sites, strict=True):
            row = (1 + bool(self.gradient)) * site.width * DTYPES[self.dtype].itemsize + (
                9 if has_item_column(site) else 0
            )
            per_item += row * len(r.x) / len(about.first.uids)
        largest = max(map(shard_size, paths)) / max(1, sum(map(shard_size, paths)))
        # a tar's part lies on the disk twice while its columns are joined
        writer.needed = round(samples * per_item * (1 + largest * devices * max(1, self.workers)))
        free = free_bytes(writer.folder)
        if self.how.progress:
            print(f"extract {', '.join(map(str, sites))}")
            print(
                f"  {about}: {nbytes(samples * per_item)} of {self.dtype} in {writer.folder} "
                f"({nbytes(free)} free){about.takes(devices, str(torch.device(host.device)))}"
                + (f"; JPEGs are decoded by {decoder()}" if any(s.modality == "image" for s in sites) else "")
            )
        if writer.needed > free:
            raise InputError(
                f"{writer.folder}: about {nbytes(writer.needed)} are needed and {nbytes(free)} are free; make room"
                + (", or store float16 or bfloat16" if self.dtype == "float32" else "")
            )

    def worker(self, host: Host, writer: StoreWriter) -> Work:
        """What writes the parts of one process's tars."""
        unit_of = {path: u for u, path in enumerate(self.paths)}
        seen = SeenUids(writer.written()) if self.data.duplicates == "refuse" else None

        def begin(path: str) -> HostPart:
            return HostPart(host, writer.open_part(unit_of[path], shard_name(path)), seen, self.gradient)

        def work(share: Share) -> None:
            stream = self.batches(host, writer, self.workers, [self.paths[u] for u in share.units], self.batch_size)
            work_tars(stream, begin, share, "extract", self.data.fault_limit, self.how.progress)

        return work

    def finish(self, writer: StoreWriter) -> Path:
        """Make the finished store of the parts."""
        if self.data.duplicates == "drop":
            drop_duplicates(writer)
        log = FaultLog()
        for faults in writer.faults():
            log.merge(faults)
        log.check(self.data.fault_limit, final=True)
        folder = writer.finish()
        if self.how.progress:
            spec = StoreSpec.load(folder)
            print(log.summary())
            if self.keep is not None:
                print(self.keep.said(log.n_seen - log.counts["duplicate"]))
            print(f"{spec.items} items, {nbytes(spec.nbytes)} in {len(spec.shards)} shards: {folder}")
        return folder


def _load(host: str | Host, run: Run, rank: int) -> Host:
    if not isinstance(host, str):
        return host
    return load_host(host, device=pick_device(run.device, rank), precision=run.precision)


def _unsized(host: Host) -> Callable:
    from mmsae.hosts import as_encoder  # brings torchvision, which vision-language hosts do not need

    return as_encoder(host, "resize device").unsized()


class Coming(NamedTuple):
    """Rows of a batch on their way from the host's device to memory."""

    batch: ImageTextBatch  #: The batch.
    rows: dict[str, Rows]  #: ``{site: rows}`` in memory, complete when they have arrived.
    arrived: torch.cuda.Event | None  #: When that is; None: they are there.

    @classmethod
    def of(cls, batch: ImageTextBatch, read: dict[str, Rows]) -> Coming:
        """Send them, without waiting for what computes them."""
        rows = {n: Rows(*(None if t is None else t.to("cpu", non_blocking=True) for t in r)) for n, r in read.items()}
        if not any(r.x.is_cuda for r in read.values()):
            return cls(batch, rows, None)
        arrived = torch.cuda.Event()
        arrived.record()
        return cls(batch._replace(images=None, inputs=None, texts=None), rows, arrived)


class HostPart(TarWork):
    """What is stored of one tar: the rows of those samples of which the host gives finite ones."""

    def __init__(self, host: Host, part: PartWriter, seen: SeenUids | None, gradient: str = "") -> None:
        self.host, self.part, self.seen, self.gradient = host, part, seen, gradient
        self.on_the_way: Coming | None = None

    def add(self, batch: ImageTextBatch, log: FaultLog) -> None:
        sites = self.part.store.sites
        read = self.host.read(batch, list(sites.values()), self.gradient)
        coming = Coming.of(batch, dict(zip(sites, read, strict=True)))
        # a GPU computes this batch while the one before it is written
        before, self.on_the_way = self.on_the_way, coming
        if before is not None:
            self._write(before, log)
        if coming.arrived is None:
            self._write(coming, log)
            self.on_the_way = None

    def _write(self, coming: Coming, log: FaultLog) -> None:
        if coming.arrived is not None:
            coming.arrived.synchronize()
        batch, rows = coming.batch, coming.rows
        bad = torch.zeros(len(batch.uids), dtype=torch.bool)
        for r in rows.values():
            for v in (r.x, r.grad):
                if v is not None:
                    bad[r.item[~v.isfinite().all(1)]] = True
        for i in bad.nonzero()[:, 0].tolist():
            log.add("not_finite", batch.shards[i], batch.keys[i], "the host gave inf or nan")
        good = (~bad).nonzero()[:, 0].tolist()
        uids, keys, captions = ([column[i] for i in good] for column in (batch.uids, batch.keys, batch.captions))
        rows = {n: _keep(r, ~bad) for n, r in rows.items()} if bad.any() else rows
        self.part.add(Rows.tokens(rows, batch), uids, keys, captions)

    def finish(self, faults: FaultLog) -> None:
        if self.on_the_way is not None:
            self._write(self.on_the_way, faults)
        part, seen = self.part, self.seen
        part.fault(faults.take())
        # a duplicate is found now, not hours later in the merge
        with nullcontext() if seen is None else seen.part(part.uids, part.keys, part.index_file, part.source):
            part.commit()

    def close(self) -> None:
        self.part.close()


def _keep(rows: Rows, good: torch.Tensor) -> Rows:
    """The rows of good items, items renumbered without gaps."""
    keep = good[rows.item]
    kept = Rows(*(None if t is None else t[keep] for t in rows))
    return kept._replace(item=(good.cumsum(0) - 1)[kept.item])
