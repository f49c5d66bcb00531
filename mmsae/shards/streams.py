"""What runs inside the workers: an endless reshuffled stream for training, and one exact pass in units of one tar."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import count
from typing import NamedTuple

import numpy as np
import torch
import webdataset as wds
from torch.utils.data import IterableDataset, get_worker_info

from mmsae.shards.batches import Reader
from mmsae.shards.faults import FaultLog
from mmsae.shards.read import Sample
from mmsae.types import ImageTextBatch, InputError

GIVE_UP = 2000
"""Unusable samples in a row after which training gives up: no batch would come, nor any judgement of faults."""


class UnitBatch(NamedTuple):
    """What a worker sends."""

    path: str  #: The tar that all samples of the batch are from; empty in training.
    batch: ImageTextBatch  #: The batch; one without samples only carries faults.
    last: bool  #: Whether the tar is finished; its last batch may be empty.
    error: str = ""  #: What the user did wrong, where reading cannot go on; raised in the main process.


class Mixed(NamedTuple):
    """One source of a mixture: its name, its weight and its shards."""

    name: str
    weight: float
    paths: list[str]


def empty_batch(faults: FaultLog) -> ImageTextBatch:
    """A batch without samples, which carries what the log counted."""
    return ImageTextBatch(None, None, [], [], [], [], faults.take())


def shard_order(paths: Sequence[str], seed: str, lane: int, lanes: int) -> Iterator[str]:
    """Endless order of shards for one of ``lanes`` readers.

    The readers deal out one endless list among them, pass after pass over all shards, each pass in its own random
    order: every shard is read equally often, and (while there are at least as many shards as readers) no shard by two
    readers in the same pass. ``webdataset.ResampledShards`` draws with replacement instead, and starts from the same
    seed whenever workers start again.
    """
    at = lane
    for turn in count():
        if at < (turn + 1) * len(paths):
            order = random.Random(f"{seed}/{turn}").sample(list(paths), len(paths))
            for i in range(at - turn * len(paths), len(paths), lanes):
                yield order[i]
                at += lanes


class TrainStream(IterableDataset):
    """Endless full batches, mixed from sources by weight and shuffled in a buffer of ``shuffle`` samples per worker.

    Everything random derives from (seed, start, rank, worker), not from the state of a global generator; in worker
    processes the global ones are seeded from it too, for random image transforms.
    """

    def __init__(self, reader: Reader, sources: list[Mixed], seed: int, shuffle: int, rank: int, world: int) -> None:
        self.reader, self.sources, self.seed, self.shuffle = reader, sources, seed, shuffle
        self.rank, self.world = rank, world
        self.start = 0  # batches drawn before this stream began: a resumed run gets another order

    def __iter__(self) -> Iterator[UnitBatch]:
        worker, workers = _worker()
        lane, lanes = self.rank * workers + worker, self.world * workers
        rng = random.Random(f"{self.seed}/{self.start}/{lane}/{lanes}")
        if get_worker_info() is not None:
            seed_global(rng.getrandbits(32))
        faults = FaultLog()
        samples = self._mix([self._endless(s, lane, lanes, faults) for s in self.sources], rng)
        if self.shuffle > 1:
            samples = wds.filters.shuffle(self.shuffle, initial=self.shuffle // 2 + 1, rng=rng)(samples)
        try:
            for batch in self.reader.batches(samples, faults, GIVE_UP):
                if batch.uids:
                    yield UnitBatch("", batch, False)
                else:  # an epoch is of full batches
                    faults.merge(batch.faults)
        except InputError as e:
            yield UnitBatch("", empty_batch(faults), True, str(e))

    def _mix(self, streams: list[Iterator[Sample]], rng: random.Random) -> Iterator[Sample]:
        if len(streams) == 1:
            yield from streams[0]
        weights = [s.weight for s in self.sources]
        while True:
            yield next(rng.choices(streams, weights)[0])

    def _endless(self, source: Mixed, lane: int, lanes: int, faults: FaultLog) -> Iterator[Sample]:
        barren = 0
        for path in shard_order(source.paths, f"{self.seed}/{self.start}/{source.name}", lane, lanes):
            barren += 1
            for sample in self.reader.samples(source.name, path, faults):
                barren = 0
                yield sample
            if barren >= max(2, len(source.paths)):
                others = "" if self.reader.keep is None else f"{faults.counts['not_in_keep']} are not in keep, "
                raise InputError(f"No usable sample in {barren} shards in a row, last {path}: {others}{faults.drops()}")


class ExactStream(IterableDataset):
    """Every sample once, tar by tar; a batch never crosses tars, so it does not depend on ranks or workers.

    The last batch of each tar carries the faults counted up to its end; where the tar ends in nothing but faults (or is
    empty), that is an empty batch. ``tars`` are ``(source name, path)``; worker i reads every n-th from the i-th on.
    """

    def __init__(self, reader: Reader, tars: Sequence[tuple[str, str]]) -> None:
        self.reader, self.tars = reader, list(tars)

    def __iter__(self) -> Iterator[UnitBatch]:
        worker, workers = _worker()
        for source, path in self.tars[worker::workers]:
            faults = FaultLog()
            try:
                held = None  # one batch is held back, to know which is the last
                for batch in self.reader.batches(self.reader.samples(source, path, faults), faults):
                    if held is not None:
                        yield UnitBatch(path, held, False)
                    held = batch
                if held is not None:
                    faults.merge(held.faults)
                    held = held._replace(faults=faults.take())
                yield UnitBatch(path, held or empty_batch(faults), True)
            except InputError as e:
                yield UnitBatch(path, empty_batch(faults), True, str(e))
                return


def seed_global(seed: int) -> None:
    """Seed the generators that image transforms draw from."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def _worker() -> tuple[int, int]:
    info = get_worker_info()
    return (0, 1) if info is None else (info.id, info.num_workers)
