"""Loaders over shards: batches for a frozen host, decoded in workers, with their faults judged in the main process."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Collection, Generator, Iterator, Sequence
from contextlib import closing
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch.utils.data import DataLoader

from mmsae.shards.batches import Collate, Reader, Tokenize, Transform
from mmsae.shards.faults import FaultLog
from mmsae.shards.sources import Source, Sources, expand_sources
from mmsae.shards.streams import ExactStream, Mixed, TrainStream, UnitBatch
from mmsae.shards.uid_list import UidList
from mmsae.shards.uid_set import UidSet
from mmsae.types import ImageTextBatch, InputError

log = logging.getLogger("mmsae.shards")

FAULT_LIMIT = 0.05
"""Default largest share of dropped samples."""


def make_pipeline(
    sources: Sources | Source | Sequence[Source | str],
    reader: Reader,
    *,
    train: bool,
    seed: int = 0,
    shuffle: int = 2000,
    workers: int = 0,
    epoch_samples: int | None = None,
    rank: int = 0,
    world: int = 1,
    fault_limit: float = FAULT_LIMIT,
    pin_memory: bool = False,
) -> TrainLoader | ExactLoader:
    """A loader of ``ImageTextBatch`` over one or several sources of shards.

    Training is an endless stream cut into epochs of ``epoch_samples``: every pass over the shards is in a new order,
    sources are mixed by weight, samples shuffled in a buffer, all batches full, all ranks have equally many. The exact
    pass gives every good sample once; batches never cross tars; a rank with fewer tars yields fewer batches, one
    without any yields nothing (do not call collectives per batch there).

    Args:
        sources: Pattern(s), ``Source``s, or ``{pattern: weight}``.
        reader: How samples become the batches of one rank, see :meth:`Reader.of`.
        train: Endless reshuffled stream, or exact pass.
        seed: Seed of all orders (training).
        shuffle: Samples in the buffer of each worker (training); it holds undecoded bytes.
        workers: Processes that read and decode; 0 does it in this one. Capped at this rank's shards.
        epoch_samples: Samples of all ranks together that make an epoch (training; required there).
        rank: This process.
        world: Number of processes.
        fault_limit: Largest share of dropped samples, judged after 1,000 samples and at the end.
        pin_memory: Whether batches arrive in pinned memory.

    Raises:
        InputError: If no shard matches, training has fewer shards than ranks, or an epoch is less than one batch.
    """
    expanded = [Mixed(s.name, s.weight, paths) for s, paths in expand_sources(sources)]
    n = sum(len(s.paths) for s in expanded)
    if not train:
        tars = [(s.name, path) for s in expanded for path in s.paths][rank::world]
        return ExactLoader(ExactStream(reader, tars), _capped(workers, len(tars), rank), fault_limit, pin_memory)
    if n < world:
        raise InputError(f"Training on {world} ranks needs at least {world} shards, and there are {n}.")
    n_batches = (epoch_samples or 0) // (reader.batch_size * world)
    if n_batches < 1:
        raise InputError(
            f"An epoch of {epoch_samples} samples is less than one batch of {reader.batch_size} on each of {world} "
            "ranks."
        )
    stream = TrainStream(reader, expanded, seed, shuffle, rank, world)
    return TrainLoader(stream, _capped(workers, n // world, rank), fault_limit, pin_memory, n_batches)


def unit_batches(
    paths: Sequence[str],
    transform: Transform | None,
    tokenize: Tokenize | None,
    batch_size: int,
    *,
    workers: int = 0,
    caption_field: str = "",
    collate: Collate | None = None,
    need: Collection[str] | None = None,
    unique: bool = True,
    pin_memory: bool = False,
    keep: UidList | None = None,
) -> Iterator[UnitBatch]:
    """Batches of the given tars, each marked with its tar and whether it is that tar's last.

    For jobs whose unit of work is one tar: with several workers the tars are decoded side by side and their batches
    arrive interleaved, but the batches of one tar come in order and are the same for any number of workers. A tar
    always ends with a batch marked ``last``, without samples where it has none. Its faults are in its own batches;
    judging them is the caller's part.

    ``workers`` is the number of processes that read and decode (0: this one), ``pin_memory`` for a host on a GPU; for
    what makes a batch see :class:`Reader`. With ``unique`` a uid is refused for the second time; jobs whose parts
    outlive a kill look for that themselves.
    """
    reader = Reader.of(transform, tokenize, batch_size, need, caption_field, collate, keep)
    stream = ExactStream(reader, [("", path) for path in paths])
    packets = _packets(stream, min(workers, len(paths)), pin_memory)
    return _unique(packets) if unique else packets


class ExactLoader:
    """One pass over every good sample of this rank's tars, each time it is iterated; see :func:`make_pipeline`.

    Attributes:
        faults: What the current or last pass counted; complete when the pass is. The faults of the batches add up to
            it wherever there is a batch at all.
    """

    def __init__(self, stream: ExactStream, workers: int, fault_limit: float, pin_memory: bool) -> None:
        self.stream, self.workers, self.fault_limit, self.pin_memory = stream, workers, fault_limit, pin_memory
        self.faults = FaultLog()

    def __iter__(self) -> Iterator[ImageTextBatch]:
        self.faults = FaultLog()
        pending, held = FaultLog(), None  # one batch is held back for the faults that come after it
        with UidSet() as uids:
            for packet in _packets(self.stream, self.workers, self.pin_memory):
                batch = packet.batch
                self.faults.merge(batch.faults)
                self.faults.check(self.fault_limit)
                uids.add_batch(batch)
                if held is not None and batch.uids:
                    yield held._replace(faults=pending.take())
                pending.merge(batch.faults)
                held = batch if batch.uids else held
        self.faults.check(self.fault_limit, final=True)
        if held is not None:
            yield held._replace(faults=pending.take())


class TrainLoader:
    """Epochs of ``n_batches`` full batches from one endless stream; see :func:`make_pipeline`.

    The workers and their shuffle buffers live on from epoch to epoch: the next epoch goes on where the last one ended,
    so that short epochs reach the far end of long shards too. A resumed run begins a new stream, seeded by the number
    of batches drawn before: the same distribution in another order (the documented statistical restart).

    Attributes:
        faults: What all epochs so far counted.
    """

    def __init__(self, stream: TrainStream, workers: int, fault_limit: float, pin_memory: bool, n_batches: int) -> None:
        self.stream, self.workers, self.fault_limit, self.pin_memory = stream, workers, fault_limit, pin_memory
        self.n_batches = n_batches
        self.faults = FaultLog()
        self.drawn = 0
        self._running: Generator[UnitBatch] | None = None

    def __len__(self) -> int:
        return self.n_batches

    def __iter__(self) -> Iterator[ImageTextBatch]:
        if self._running is None:
            self.stream.start = self.drawn
            self._running = _packets(self.stream, self.workers, self.pin_memory)
        for _ in range(self.n_batches):
            batch = next(self._running).batch
            self.drawn += 1
            self.faults.merge(batch.faults)
            self.faults.check(self.fault_limit)
            yield batch
        self.faults.check(self.fault_limit, final=True)

    def state_dict(self) -> dict[str, Any]:
        """Batches drawn so far, and the hash of the list of uids that they are of."""
        return {"drawn": self.drawn} | ({} if self._list is None else {"keep": self._list})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Begin a new stream after ``state["drawn"]`` batches.

        Raises:
            InputError: They were of another list of uids.
        """
        if state.get("keep") != self._list:
            raise InputError(
                f"the checkpoint was made with keep {state.get('keep')}, this run has {self._list} (hash of the uids):"
                " resuming would not continue the same run"
            )
        self.drawn = state["drawn"]
        self.close()

    @property
    def _list(self) -> str | None:
        keep = self.stream.reader.keep
        return None if keep is None else keep.hash

    def close(self) -> None:
        """Stop the workers; the next epoch begins a new stream."""
        if self._running is not None:
            self._running.close()
        self._running = None


def _packets(stream: ExactStream | TrainStream, workers: int, pin_memory: bool) -> Generator[UnitBatch]:
    own = torch.Generator().manual_seed(0)  # else starting workers would advance the trainer's generator
    options = {"collate_fn": _same, "worker_init_fn": _leave_sigterm_to_main, "generator": own}
    loader = DataLoader(stream, batch_size=None, num_workers=workers, pin_memory=pin_memory, **options)
    for packet in _started(loader):
        if packet.error:
            raise InputError(packet.error)
        yield packet


_SIGTERM_WAITS = hasattr(signal, "sigtimedwait")  # not on macOS and Windows


def _started(loader: DataLoader) -> Iterator[UnitBatch]:
    """The running loader, whose workers block SIGTERM from their first instruction on, as this thread does meanwhile.

    A SIGTERM that comes while they start is this process's as soon as they have.
    """
    if not _SIGTERM_WAITS:
        return iter(loader)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _leave_sigterm_to_main(_: int) -> None:
    """Have a worker end by SIGTERM of the main process alone, or by its death.

    Schedulers send it to every process of a job, and the main process needs its workers to finish what it is at.
    """
    if _SIGTERM_WAITS:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # a worker that was not forked starts without
        threading.Thread(target=_end_by_main, args=(multiprocessing.parent_process(),), daemon=True).start()


def _end_by_main(main: BaseProcess) -> None:
    while main.is_alive():  # torch asks too, but not whether it had ended before the worker first asked
        told = signal.sigtimedwait({signal.SIGTERM}, 1)
        if told is not None and told.si_pid == main.pid:
            break
    os._exit(0)


def _unique(packets: Iterator[UnitBatch]) -> Iterator[UnitBatch]:
    with closing(packets), UidSet() as uids:
        for packet in packets:
            uids.add_batch(packet.batch)
            yield packet


def _same(packet: UnitBatch) -> UnitBatch:
    return packet


def _capped(workers: int, shards: int, rank: int) -> int:
    if workers > shards and rank == 0:
        log.warning("%d workers asked for, %d used: that is how many shards this rank has.", workers, shards)
    return min(workers, shards)
