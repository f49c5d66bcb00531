"""Pairs -> frozen host -> mixing buffer -> Tokens: training without a store."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

from mmsae.activations.mixing_buffer import MixingBuffer, mix_side_by_side
from mmsae.hosts import Host
from mmsae.shards import FaultLog, TrainLoader
from mmsae.types import Faults, ImageTextBatch, SideBySide, Site, Tokens

Choices = Mapping[str, Mapping[str, Site | str] | None]


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
        choices: ``{name: sites}`` of SAEs that read at different sites: batches are
            :class:`~mmsae.types.SideBySide`, from one pass of the host and with a buffer for each choice.
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
        choices: Choices | None = None,
    ) -> None:
        self.host, self.pipeline, self.n_batches = host, pipeline, n_batches
        self.batch_size, self.capacity, self.quotas, self.seed = batch_size, capacity, quotas, seed
        self.half, self.choices = half, dict(choices or {})
        self._capture = _capture(host, sites, gradient, choices)
        self.epoch, self.batch, self._begun = 0, 0, False
        self._faults = FaultLog()
        self._running: Iterator[Tokens] | Iterator[SideBySide] | None = None

    def __len__(self) -> int:
        return self.n_batches

    def __iter__(self) -> Iterator[Tokens]:
        if self._begun or self.batch >= self.n_batches:
            self.epoch, self.batch = self.epoch + 1, 0
        self._begun = False
        if self._running is None:
            seed = hash((self.seed, self.epoch, self.batch)) % 2**63  # of integers: equal in every process
            made = partial(MixingBuffer, self.capacity, self.batch_size, seed, self.quotas, self.half)
            if self.choices:
                self._running = mix_side_by_side({name: made() for name in self.choices}, self._captured())
            else:
                self._running = made().mix(self._captured())
        return self._run(self.batch)

    def _captured(self) -> Iterator[Any]:
        while True:
            for batch in self.pipeline:
                self._faults.merge(batch.faults)
                yield self._capture(batch)

    def _run(self, first: int) -> Iterator[Tokens | SideBySide]:
        for b in range(first, self.n_batches):
            batch = next(self._running)
            self.batch, self._begun = b + 1, True
            yield _with_faults(batch, self._faults.take())

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
        choices: Choices | None = None,
    ) -> None:
        self.batches, self._capture = batches, _capture(host, sites, gradient, choices)

    def __iter__(self) -> Iterator[Tokens | SideBySide]:
        for batch in self.batches:
            yield _with_faults(self._capture(batch), batch.faults or Faults())


def _with_faults(batch: Tokens | SideBySide, faults: Faults) -> Tokens | SideBySide:
    if isinstance(batch, SideBySide):
        return SideBySide({name: tokens._replace(faults=faults) for name, tokens in batch.of.items()})
    return batch._replace(faults=faults)


def _capture(
    host: Host, sites: Mapping[str, Site | str] | None, gradient: str, choices: Choices | None
) -> Callable[[ImageTextBatch], Tokens | SideBySide]:
    options: dict[str, Any] = {"gradient": gradient} if gradient else {}
    if gradient:
        host.objective(gradient)  # what the host has not is refused before anything is read
    if choices:
        return lambda batch: SideBySide(host.capture_each(batch, choices, **options))
    return partial(host.capture, sites=sites, **options)
