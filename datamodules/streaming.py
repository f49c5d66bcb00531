"""Batches of activations computed while training, without a store."""

from __future__ import annotations

from typing import Any, Literal

import lightning

from mmsae.activations import CaptureLoader, StreamingLoader
from mmsae.hosts import Host, embed_width, host_modalities, load_host, site_width, with_options
from mmsae.shards import FAULT_LIMIT, Sources, as_sources, count_samples, make_pipeline
from mmsae.types import InputError, Site


class StreamingActivations(lightning.LightningDataModule):
    """Image-text shards through a frozen host and a mixing buffer.

    Decoding runs in workers. The host runs in the training process on the trainer's device, outside the
    LightningModule: it is in no checkpoint and not wrapped by DDP. A resumed run is a statistical restart (the same
    distribution in another order); for a run that can be resumed exactly, extract a store.

    Args:
        shards: Shards to train on: path, folder, glob or brace pattern, several of them, ``{pattern: weight}``, or
            sources with ``pattern, weight, name``.
        host: Name of the host, see ``mmsae.hosts.load_host``.
        val_shards: Shards to validate on, every sample once, unmixed.
        d_in: Width; by default read from the host's configuration, without weights.
        sites: ``{modality: site}``; the host's embeddings by default. ``{image: image.embed}`` reads images only.
        batch_size: Pairs (token sites: rows per modality) per batch and rank.
        quotas: ``{modality: rows per batch}`` for token sites.
        buffer_pairs: Capacity of the mixing buffer in pairs (token sites: rows per modality), on the device.
        read_batch: Samples per forward pass of the host. Default: 256; on a CPU as many as have the area of 16 images
            of 224 pixels.
        epoch_samples: Samples of all ranks together that make an epoch; as many as the shards hold where None.
        epoch_batches: Batches per epoch and rank; where None, ``epoch_samples / (batch_size * ranks)``.
        workers: Processes that read and decode.
        shuffle: Samples in the shuffle buffer of each worker.
        precision: ``fp32`` or ``bf16`` autocast of the host.
        seed: Of all orders.
        caption_field: Field of json that holds the caption; empty: ``txt``, or json's ``caption``.
        text: Of vision-language hosts: ``question``: json's ``question`` (else the caption), the answer's turn empty;
            ``question+answer``: whole conversations.
        fault_limit: Largest share of samples that may be unusable.
        allow_random: Accept a host whose files lack weights, with random ones in their place.
        host_options: Options that the host is loaded with, which become part of its name (docs/how-to/hosts.md).
    """

    def __init__(
        self,
        shards: Sources,
        host: str,
        val_shards: Sources | None = None,
        d_in: int | None = None,
        sites: dict[str, str] | None = None,
        batch_size: int = 512,
        quotas: dict[str, int] | None = None,
        buffer_pairs: int = 16384,
        read_batch: int | None = None,
        epoch_samples: int | None = None,
        epoch_batches: int | None = None,
        workers: int = 2,
        shuffle: int = 2000,
        precision: str = "fp32",
        seed: int = 0,
        caption_field: str = "",
        text: Literal["question", "question+answer"] = "question",
        fault_limit: float = FAULT_LIMIT,
        allow_random: bool = False,
        host_options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if buffer_pairs < batch_size:
            raise InputError(f"buffer_pairs is {buffer_pairs}, less than batch_size, which is {batch_size}")
        self.shards, self.val_shards, self._d_in, self.chosen_sites = shards, val_shards, d_in, sites
        self.host = with_options(host, host_options or {})
        self.batch_size, self.quotas, self.buffer_pairs, self.read_batch = batch_size, quotas, buffer_pairs, read_batch
        self.epoch_samples, self.epoch_batches = epoch_samples, epoch_batches
        self.workers, self.shuffle, self.precision, self.seed = workers, shuffle, precision, seed
        self.caption_field, self.fault_limit, self.allow_random = caption_field, fault_limit, allow_random
        self.text = text
        self.loaded_host: Host | None = None

    @property
    def d_in(self) -> int | dict[str, int]:
        """Width: one number, or one per modality where they differ; needs no weights."""
        if self._d_in is None:
            if self.chosen_sites is None:
                self._d_in = embed_width(self.host)
            else:
                widths = {m: site_width(self.host, s) for m, s in self.chosen_sites.items()}
                self._d_in = next(iter(widths.values())) if len(set(widths.values())) == 1 else widths
        return self._d_in

    @property
    def modalities(self) -> tuple[str, ...]:
        """What a batch holds."""
        return tuple(self.chosen_sites or host_modalities(self.host))

    @property
    def sites(self) -> dict[str, Site]:
        """Where the activations are read; empty before ``setup``, because a site's identity is in the weights."""
        if self.loaded_host is None:
            return {}
        wanted = self.chosen_sites or self.loaded_host.default_sites()
        return {m: self.loaded_host.site(s) for m, s in wanted.items()}

    def setup(self, stage: str | None = None) -> None:
        """Load the host onto the trainer's device, once.

        Raises:
            InputError: The host cannot be had, or its width is not the one that was given.
        """
        if self.loaded_host is None:
            device = self.trainer.strategy.root_device if self.trainer else "cpu"
            self.loaded_host = load_host(
                self.host, device=device, precision=self.precision, allow_random=self.allow_random
            )
            self.read_batch = self.loaded_host.batch_size(self.read_batch)
            for m, site in self.sites.items():
                want = self.d_in[m] if isinstance(self.d_in, dict) else self.d_in
                if site.width != want:
                    raise InputError(f"d_in is {want}, but {m} activations of host {self.host} have width {site.width}")

    def train_dataloader(self) -> StreamingLoader:
        """Mixed batches without end, cut into epochs."""
        rank, world = self._ranks()
        samples = self.epoch_samples
        if samples is None:
            samples = sum(count_samples(source.pattern) for source in as_sources(self.shards))
        n_batches = self.epoch_batches or samples // (self.batch_size * world)
        if n_batches < 1:
            raise InputError(
                f"an epoch of {samples} samples is less than one batch of {self.batch_size} on each of {world} ranks"
            )
        return StreamingLoader(
            self.loaded_host,
            self._pipeline(self.shards, train=True, epoch_samples=max(samples, self.read_batch * world)),
            n_batches,
            self.batch_size,
            self.buffer_pairs,
            sites=self.chosen_sites,
            quotas=self.quotas,
            seed=self.seed * 2**20 + rank,
        )

    def val_dataloader(self) -> CaptureLoader | list:
        """Every validation sample once; ranks may have different numbers of batches."""
        if self.val_shards is None:
            return []
        self.setup()
        return CaptureLoader(self.loaded_host, self._pipeline(self.val_shards, train=False), self.chosen_sites)

    test_dataloader = predict_dataloader = val_dataloader

    def _ranks(self) -> tuple[int, int]:
        self.setup()
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _pipeline(self, sources: Sources, train: bool, epoch_samples: int | None = None):
        rank, world = self._ranks()
        return make_pipeline(
            sources,
            batch_size=self.read_batch,
            train=train,
            seed=self.seed,
            shuffle=self.shuffle,
            workers=self.workers,
            epoch_samples=epoch_samples,
            rank=rank,
            world=world,
            fault_limit=self.fault_limit,
            caption_field=self.caption_field,
            pin_memory=self.loaded_host.device.type == "cuda",
            **self.loaded_host.reading(self.modalities, self.text),
        )
