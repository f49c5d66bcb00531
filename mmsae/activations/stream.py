"""Pairs -> frozen host -> mixing buffer -> Tokens: training without a store."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

from mmsae.activations.mixing_buffer import MixingBuffer
from mmsae.hosts import Host
from mmsae.shards import FaultLog, TrainLoader
from mmsae.types import Faults, ImageTextBatch, Site, Tokens


class StreamingLoader:
    """Training batches of a host's activations, mixed over a buffer.

    Shards are decoded in the pipeline's workers; the host and the buffer live here, in the training process and on the
    host's device. Both go on from epoch to epoch. A resumed run is a statistical restart: it keeps the epoch and the
    number of batches left in it, and reads on in a new random order with an empty buffer.

    Args:
        host: The frozen host.
        pipeline: Endless image-text batches, :func:`mmsae.shards.make_pipeline` with ``train=True``.
        n_batches: Batches per epoch and rank.
        batch_size: Units per batch (see :class:`MixingBuffer`).
        capacity: Units in the buffer.
        sites: ``{modality: site}``; the host's embeddings by default.
        quotas: ``{modality: rows per batch}`` for token sites.
        half: See :class:`MixingBuffer`.
        gradient: Loss of the host whose gradients come with the rows, see :meth:`mmsae.hosts.Host.read`; empty: none.
        seed: Seed of the buffer's draws; give ranks different ones.
    """

    def __init__(
        self,
        host: Host,
        pipeline: TrainLoader,
        n_batches: int,
        batch_size: int = 512,
        capacity: int = 8192,
        *,
        sites: Mapping[str, Site | str] | None = None,
        quotas: Mapping[str, int] | None = None,
        half: bool = False,
        gradient: str = "",
        seed: int = 0,
    ) -> None:
        self.host, self.pipeline, self.n_batches, self.sites = host, pipeline, n_batches, sites
        self.batch_size, self.capacity, self.quotas, self.seed = batch_size, capacity, quotas, seed
        self.half = half
        self._capture = _capture(host, sites, gradient)
        self.epoch, self.batch, self._begun = 0, 0, False
        self._faults = FaultLog()
        self._running: Iterator[Tokens] | None = None

    def __len__(self) -> int:
        return self.n_batches

    def __iter__(self) -> Iterator[Tokens]:
        if self._begun or self.batch >= self.n_batches:
            self.epoch, self.batch = self.epoch + 1, 0
        self._begun = False
        if self._running is None:
            seed = hash((self.seed, self.epoch, self.batch)) % 2**63  # of integers: equal in every process
            buffer = MixingBuffer(self.capacity, self.batch_size, seed, self.quotas, self.half)
            self._running = buffer.mix(self._captured())
        return self._run(self.batch)

    def _captured(self) -> Iterator[Tokens]:
        while True:
            for batch in self.pipeline:
                self._faults.merge(batch.faults)
                yield self._capture(batch)

    def _run(self, first: int) -> Iterator[Tokens]:
        for b in range(first, self.n_batches):
            tokens = next(self._running)
            self.batch, self._begun = b + 1, True
            yield tokens._replace(faults=self._faults.take())

    def state_dict(self) -> dict[str, Any]:
        """Epoch, batches done in it, and where the pipeline is."""
        return {"epoch": self.epoch, "batch": self.batch, "pipeline": self.pipeline.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restart the stream after that point."""
        self.epoch, self.batch, self._begun = state["epoch"], state["batch"], False
        self.pipeline.load_state_dict(state["pipeline"])
        self._running = None

    def close(self) -> None:
        """Stop the pipeline's workers; the next epoch begins a new stream."""
        self._running = None
        self.pipeline.close()


class CaptureLoader:
    """Every batch of an exact pass, captured and unmixed: validation without a store."""

    def __init__(
        self,
        host: Host,
        batches: Iterable[ImageTextBatch],
        sites: Mapping[str, Site | str] | None = None,
        gradient: str = "",
    ) -> None:
        self.batches, self._capture = batches, _capture(host, sites, gradient)

    def __iter__(self) -> Iterator[Tokens]:
        for batch in self.batches:
            yield self._capture(batch)._replace(faults=batch.faults or Faults())


def _capture(host: Host, sites: Mapping[str, Site | str] | None, gradient: str) -> Callable[[ImageTextBatch], Tokens]:
    if gradient:
        host.objective(gradient)  # what the host has not is refused before anything is read
        return partial(host.capture, sites=sites, gradient=gradient)
    return partial(host.capture, sites=sites)
