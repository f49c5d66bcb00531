"""Passes over shards in units of one tar: one process or several, resumable, with an estimate before and a bar during.

Batches never cross tars and a tar belongs to one worker of one process: a part does not depend on their number.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from mmsae.filtering.passes import make_pass
from mmsae.filtering.scorers.clip import ClipScorer, PairReader, Scorer, ScorerSpec, make_scorer, pairs_up
from mmsae.jobs.estimate import duration
from mmsae.jobs.folder import LOCK, at_work
from mmsae.jobs.processes import end_with_parent
from mmsae.jobs.units import done, part_path, units, write_part
from mmsae.shards import FaultLog, UnitBatch, unit_batches
from mmsae.shards.tar import groups
from mmsae.types import Faults

_stop: Any = None  # in the processes of a pass on several devices: an event, set when one of them has failed
_rank = 0  # there too: which device is this process's
_reader: PairReader | None = None  # there too: host and SAE, loaded once for all passes


class Pass(NamedTuple):
    """One pass over shards; plain values, so that it travels to other processes.

    Attributes:
        kind: ``fit``, ``target`` or ``score``.
        paths: All its tars.
        folder: Of its part files.
        spec: How to make what computes.
        modality: Whose codes to keep (``target`` and ``score``); empty: none.
        batch_size: Samples per batch.
        workers: Decoding processes per device.
        caption_field: Field of json with the caption.
        fault_limit: Share of dropped samples that is tolerated.
        progress: Whether to print and show bars.
    """

    kind: str
    paths: list[str]
    folder: str
    spec: ScorerSpec
    modality: str
    batch_size: int
    workers: int
    caption_field: str
    fault_limit: float
    progress: bool

    @property
    def random(self) -> int | None:
        """Seed of the score ``random``, where that is asked for."""
        return self.spec.seed if self.spec.score == "random" else None

    def missing(self) -> list[int]:
        """Tars whose part is not there."""
        return [u.index for u in units(self.paths) if not done(self.folder, u)]

    def parts(self) -> list[Path]:
        """All part files, in the order of the tars."""
        return [part_path(self.folder, u) for u in units(self.paths)]


class Processes:
    """The processes of a job on several devices, started when the first pass needs them; a context manager.

    Args:
        devices: Their number; with one, everything is done in the process that leads.

    Attributes:
        lead: Whether this process is the one that merges and writes; here it always is.
    """

    lead = True

    def __init__(self, devices: int) -> None:
        self.devices = devices
        self._pool: ProcessPoolExecutor | None = None
        self._stop: Any = None

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self._stop.set()
            self._pool.shutdown()

    def agree(self, value: Any) -> Any:
        """What the leading process says, here itself."""
        return value

    def wait(self) -> None:
        """Until all processes are here; the others only work while this one waits for them."""

    def run(self, job: Pass, worker: Scorer | PairReader, todo: list[int]) -> None:
        """Do some tars of a pass, dealt out among the processes; the first failure of one ends all."""
        if min(self.devices, len(todo)) == 1:
            TarWork(job, worker, todo, lead=True).run()
            return
        if self._pool is None:
            context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
            self._stop = context.Event()
            started = (self._stop, context.Value("i", 0))
            self._pool = ProcessPoolExecutor(self.devices, context, _remember, started)
        # dealt out here: what is missing changes as soon as the first process works
        jobs = [self._pool.submit(_share, job, todo[r :: self.devices], r == 0) for r in range(self.devices)]
        failed = next((j.exception() for j in wait(jobs, return_when=FIRST_EXCEPTION).done if j.exception()), None)
        if failed:
            raise failed


def run_pass(job: Pass, processes: Processes, worker: Scorer | PairReader) -> list[Path]:
    """Write the parts that are missing; returns all parts.

    Args:
        job: What to do.
        processes: Who does it.
        worker: What computes, in this process.

    Raises:
        InputError: Too many samples are unusable, or what the scorer refuses.
    """
    todo = processes.agree(job.missing())
    if todo:
        Path(job.folder).mkdir(parents=True, exist_ok=True)
        if processes.lead:
            announce(job, worker, todo, min(processes.devices, len(todo)))
        processes.run(job, worker, todo)
    return job.parts()


def batches(job: Pass, worker: Scorer | PairReader, todo: Sequence[int], workers: int) -> Iterator[UnitBatch]:
    """Batches of some of the tars, as the host wants them."""
    return unit_batches(
        [job.paths[u] for u in todo],
        worker.transform,
        worker.tokenize,
        job.batch_size,
        workers=workers,
        caption_field=job.caption_field,
        collate=worker.collate,
        unique=False,
    )


class TarWork:
    """Writes the parts of some tars, batch by batch.

    Args:
        job: The pass.
        worker: What computes.
        todo: The tars of this process.
        lead: Whether it shows its progress.
    """

    def __init__(self, job: Pass, worker: Scorer | PairReader, todo: list[int], lead: bool) -> None:
        self.job, self.worker, self.todo = job, worker, todo
        self._unit_of = {u.path: u for u in units(job.paths)}
        self._total, self._passes, self._logs, self._finished = FaultLog(), {}, {}, 0
        self._bar = tqdm(desc=job.kind, unit="sample", disable=not (job.progress and lead))

    def stream(self) -> Iterator[UnitBatch]:
        """The batches of its tars."""
        with closing(batches(self.job, self.worker, self.todo, self.job.workers)) as stream:
            yield from stream

    def add(self, step: UnitBatch) -> None:
        """Add a batch; after the last of a tar its part is written."""
        path, batch, job = step.path, step.batch, self.job
        if path not in self._passes:
            self._passes[path] = make_pass(job.kind, self.worker, job.modality, job.random)
            self._logs[path] = FaultLog()
        log = FaultLog()
        log.merge(batch.faults)
        if batch.uids:
            self._passes[path].add(batch, log)
        faults = log.take()
        self._logs[path].merge(faults)
        self._total.merge(faults)
        self._bar.update(len(batch.uids))
        if step.last:
            write_part(job.folder, self._unit_of[path], self._passes.pop(path).part(self._logs.pop(path)))
            self._finished += 1
            self._bar.set_postfix(tars=f"{self._finished}/{len(self.todo)}", dropped=self._total.dropped)
        self._total.check(job.fault_limit)

    def run(self) -> None:
        """All of it, unless the job fails elsewhere."""
        with self._bar, closing(self.stream()) as stream:
            for step in stream:
                if _stop is not None and _stop.is_set():
                    return
                self.add(step)


def announce(job: Pass, worker: Scorer | PairReader, todo: list[int], devices: int) -> None:
    """Say what will be done and about how long; samples are counted in at most four tars, the time is one batch's."""
    if not job.progress:
        return
    paths = [job.paths[u] for u in todo]
    sample = paths[:: -(-len(paths) // 4)]
    counted = sum(1 for p in sample for _ in groups(p, FaultLog(), read=False))
    n = round(counted * sum(map(os.path.getsize, paths)) / max(1, sum(map(os.path.getsize, sample))))
    start = time.perf_counter()
    with closing(batches(job, worker, todo, 0)) as stream:
        first = next(step.batch for step in stream)
    decode = time.perf_counter() - start
    before = f" ({len(job.paths) - len(todo)} done before)" if len(todo) < len(job.paths) else ""
    text = f"{job.kind}: {len(todo)} shards{before}, about {n} samples"
    if first.uids:
        for _ in range(2):  # the first pass allocates and compiles
            start = time.perf_counter()
            make_pass(job.kind, worker, job.modality, job.random).add(first._replace(), FaultLog())
        run = time.perf_counter() - start
        each = max(run, decode / job.workers) if job.workers else run + decode
        text += f", about {duration(n / len(first.uids) / devices * each)} on {devices} x {worker.device}"
    print(text, flush=True)


def _remember(stop: Any, count: Any) -> None:
    global _stop, _rank
    with count.get_lock():
        _rank, count.value = count.value, count.value + 1
    _stop = stop
    end_with_parent()


def _share(job: Pass, todo: list[int], lead: bool) -> None:
    """One process's tars of a pass."""
    global _reader
    with at_work(Path(job.folder).parent / LOCK):
        if not pairs_up(job.spec):
            spec = job.spec._replace(score="l0") if job.kind == "fit" else job.spec  # there are no weights yet
            worker = make_scorer(spec, _rank)
        else:
            _reader = _reader or PairReader(job.spec, _rank)
            worker = _reader if job.kind == "fit" else ClipScorer(job.spec, reader=_reader)
        TarWork(job, worker, todo, lead).run()


def judged(faults: Sequence[dict[str, Any]], limit: float) -> FaultLog:
    """The faults of all parts together.

    Raises:
        InputError: Their share is above the limit.
    """
    log = FaultLog()
    for f in faults:
        log.merge(Faults(f["seen"], f["counts"], tuple(tuple(e) for e in f["examples"])))
    log.check(limit, final=True)
    return log
