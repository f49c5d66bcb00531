"""Options that several datamodules share; in recipes they stand beside the others, see ``mmsae.options.flat``."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from mmsae.hosts import Host, load_host, with_options
from mmsae.options import Data
from mmsae.shards import ExactLoader, Sources, TrainLoader, UidList, as_sources, count_samples, make_pipeline
from mmsae.shards.batches import Reader
from mmsae.shards.sources import expand_sources
from mmsae.types import InputError


def ranks_of(trainer: Any) -> tuple[int, int]:
    """``(number, of how many)`` of this process among those that share the data; ``(0, 1)`` without a trainer.

    They are the trainer's ranks but where its strategy has all of them read the same batches.
    """
    shares = getattr(trainer.strategy, "distributed_sampler_kwargs", None) if trainer else None
    return (shares["rank"], shares["num_replicas"]) if shares else (0, 1)


@dataclass(frozen=True)
class Loading:
    """How the host is loaded."""

    allow_random: bool = False
    """Accept a host whose files lack weights, with random ones in their place."""
    host_options: dict[str, Any] | None = None
    """Options that the host is loaded with, which become part of its name (docs/how-to/hosts.md)."""

    def name(self, host: str) -> str:
        """The name of a host with its options."""
        return with_options(host, self.host_options or {})

    def load(self, name: str, **where: Any) -> Host:
        """The host, as :func:`mmsae.hosts.load_host` loads it."""
        return load_host(name, **where, allow_random=self.allow_random)


@dataclass(frozen=True)
class Reading(Data):
    """How samples are read."""

    workers: int = 2
    """Processes that read and decode."""
    shuffle: int = 2000
    """Samples in the shuffle buffer of each worker."""
    epoch_samples: int | None = None
    """Samples of all ranks together that make a training epoch. Default: as many as the shards hold, whose headers are
    then read once; with ``keep`` as many as it lists, for which all of them are read once."""
    keep: str | None = None
    """File of uids (``uids.npy`` of ``mmsae filter``, or DataComp's): only samples whose uid it lists are used."""

    @cached_property
    def uids(self) -> UidList | None:
        """The list of uids, opened once."""
        return UidList.of(self.keep)

    def epoch(self, sources: Sources) -> int:
        """Samples of an epoch."""
        if self.epoch_samples is not None:
            return self.epoch_samples
        if self.uids is None:
            return sum(count_samples(source.pattern) for source in as_sources(sources))
        found = sum(count_samples(units, keep=self.uids, source=s.name) for s, units in expand_sources(sources))
        rank_zero_info(self.uids.said(found))
        return found

    def pipeline(
        self, sources: Sources, reader: Reader, epoch: int | None, seed: int, ranks: tuple[int, int], pin_memory: bool
    ) -> TrainLoader | ExactLoader:
        """Batches of this rank, ``ranks = (number, of how many)``: epochs of so many samples, or one exact pass."""
        return make_pipeline(
            sources,
            reader,
            train=epoch is not None,
            seed=seed,
            shuffle=self.shuffle,
            workers=self.workers,
            epoch_samples=epoch,
            rank=ranks[0],
            world=ranks[1],
            fault_limit=self.fault_limit,
            pin_memory=pin_memory,
        )


@dataclass(frozen=True)
class Mixing:
    """How rows of activations are mixed, in a buffer on the device."""

    batch_size: int = 512
    """Pairs (token sites: rows per modality) per batch and rank."""
    quotas: dict[str, int] | None = None
    """``{modality: rows per batch}`` for token sites."""
    refill_at_half: bool = False
    """Whether the buffer is emptied by half and then filled up (FAST), in place of one batch for what comes in."""

    def __post_init__(self) -> None:
        if self.capacity < self.batch_size:
            [name] = (f.name for f in fields(self) if f.name.startswith("buffer_"))
            raise InputError(f"{name} is {self.capacity}, less than batch_size, which is {self.batch_size}")

    @property
    def capacity(self) -> int:
        """Units in the buffer."""
        raise NotImplementedError
