"""Batches of activations computed while training, without a store."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from datamodules.host_activations import HostActivations
from datamodules.options import Loading, Mixing, Reading
from mmsae.activations import CaptureLoader, StreamingLoader
from mmsae.hosts import Host
from mmsae.hosts.gradient import reading
from mmsae.options import flat
from mmsae.shards import ExactLoader, Reader, Sources, TrainLoader
from mmsae.shards.batches import Collate
from mmsae.types import InputError


@dataclass(frozen=True)
class PairMixing(Mixing):
    """How rows of activations are mixed, in a buffer on the device."""

    buffer_pairs: int = 16384
    """Capacity of the mixing buffer in pairs (token sites: rows per modality), on the device."""
    read_batch: int | None = None
    """Samples per forward pass of the host. Default: 256; on a CPU as many as have the area of 16 images of 224
    pixels."""
    epoch_batches: int | None = None
    """Batches per epoch and rank; where None, ``epoch_samples / (batch_size * ranks)``."""

    @property
    def capacity(self) -> int:
        return self.buffer_pairs


@dataclass(frozen=True)
class Conversations:
    """What vision-language hosts read of a sample, and in which sequences."""

    text: Literal["question", "question+answer"] = "question"
    """What they read: ``question``: json's ``question`` (else the caption), the answer's turn empty;
    ``question+answer``: whole conversations."""
    max_tokens: int | None = None
    """Largest number of tokens of a sequence; longer texts lose their last words. Default: the host's context."""
    packing: Literal["none", "shared", "separate"] = "none"
    """``none``: every conversation is a sequence of its own (FAST). ``shared``: they follow each other in sequences of
    up to ``max_tokens`` and see all before them. ``separate``: they stand there and see themselves alone."""

    def collate(self, host: Host, made: Collate | None) -> Collate | None:
        """The host's collate, limited and packed as asked."""
        if self.max_tokens is None and self.packing == "none":
            return made
        if made is None:
            asked = f"max_tokens is {self.max_tokens} and packing {self.packing}"
            raise InputError(f"{asked}, but host {host.hint} reads captions: it has no conversations")
        made = made if self.max_tokens is None else made.limited(self.max_tokens)
        return made if self.packing == "none" else host.packer(made, self.packing == "separate")


@flat
class StreamingActivations(HostActivations):
    """Image-text shards through a frozen host and a mixing buffer.

    Decoding runs in workers. The host runs in the training process on the trainer's device, outside the
    LightningModule: it is in no checkpoint and not wrapped by DDP. A resumed run is a statistical restart (the same
    distribution in another order), on any number of ranks and workers; for a run that can be resumed exactly, extract a
    store.

    Args:
        shards: Shards to train on: path, folder, glob or brace pattern, several of them, ``{pattern: weight}``, or
            sources with ``pattern, weight, name``.
        host: Name of the host, see ``mmsae.hosts.load_host``.
        val_shards: Shards to validate on, every sample once, unmixed.
        d_in: Width; by default read from the host's configuration, without weights.
        sites: ``{modality: site}``; the host's embeddings by default. ``{image: image.embed}`` reads images only.
        precision: ``fp32`` or ``bf16`` autocast of the host.
        seed: Seed of all orders.
        gradient: Loss of the host whose gradients come with the rows (g-SAE): ``contrastive`` (image-text hosts; the
            samples of a forward pass are each other's negatives), ``classifier`` (the host's own head; samples need
            ``cls``), ``lm`` (vision-language hosts) or ``diffusion`` (text-to-image hosts like Stable Diffusion 1.x; an
            item's noise depends on its uid); empty: none.
    """

    def __init__(
        self,
        shards: Sources,
        host: str,
        val_shards: Sources | None = None,
        d_in: int | None = None,
        sites: dict[str, str] | None = None,
        precision: str = "fp32",
        seed: int = 0,
        gradient: Literal["", "contrastive", "classifier", "lm", "diffusion"] = "",
        conversations: Conversations = Conversations(),
        mixing: PairMixing = PairMixing(),
        reading: Reading = Reading(),
        loading: Loading = Loading(),
    ) -> None:
        super().__init__(host, sites, d_in, precision, loading, mixing, seed)
        self.shards, self.val_shards, self.reading = shards, val_shards, reading
        self.conversations, self.text, self.gradient = conversations, conversations.text, gradient

    def train_dataloader(self) -> StreamingLoader:
        _, world = self.ranks()
        samples, (size, _) = self.reading.epoch(self.shards), self.size()
        n_batches = self.mixing.epoch_batches or samples // (size * world)
        if n_batches < 1:
            raise InputError(f"an epoch of {samples} samples is less than one batch of {size} on each of {world} ranks")
        least = self.loaded_host.batch_size(self.mixing.read_batch) * world
        return self.mixed(self.loaded_host, self._pipeline(self.shards, max(samples, least)), n_batches, self.gradient)

    def val_dataloader(self) -> CaptureLoader | list:
        """Every validation sample once; ranks may have different numbers of batches."""
        if self.val_shards is None:
            return []
        self.setup()
        pipeline = self._pipeline(self.val_shards, None)
        return CaptureLoader(self.loaded_host, pipeline, self.chosen_sites, self.gradient, self.choices)

    test_dataloader = predict_dataloader = val_dataloader

    def _pipeline(self, sources: Sources, epoch: int | None) -> TrainLoader | ExactLoader:
        host = self.loaded_host
        choices = [self.at(name) for name in self.choices] or [self]
        read = dict.fromkeys(m for own in choices for m in own.modalities)
        made = reading(host, tuple(read), self.text, self.gradient)
        made["collate"] = self.conversations.collate(host, made["collate"])
        reader = Reader.of(
            batch_size=host.batch_size(self.mixing.read_batch),
            caption_field=self.reading.caption_field,
            keep=self.reading.uids,
            **made,
        )
        pin_memory = host.device.type == "cuda"
        return self.reading.pipeline(sources, reader, epoch, self.seed, self.ranks(), pin_memory)
