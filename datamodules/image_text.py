"""Image-text shards as a LightningDataModule."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import lightning
import torch

from mmsae.hosts import embed_width, host_modalities, load_host, with_options
from mmsae.shards import FAULT_LIMIT, ExactLoader, Sources, TrainLoader, as_sources, count_samples, make_pipeline
from mmsae.types import IMAGE, TEXT, InputError, Site


class ImageTextDataModule(lightning.LightningDataModule):
    """Decoded, transformed and tokenised pairs from shards, as ``ImageTextBatch``.

    Training is resampled: an endless reshuffled stream, mixed from sources by weight, cut into epochs of
    ``epoch_samples``. Validation, test and prediction go through every sample once.

    The transform and the tokenizer are the host's own; nothing is loaded before ``setup``.

    Args:
        train: Shards to train on: a path, folder, glob or brace pattern, several of them, ``{pattern: weight}``, or
            ``Source``s with ``pattern, weight, name``.
        val: Shards for ``validate``, ``test`` and ``predict``.
        host: Name of the host whose transform and tokenizer are used, see ``mmsae.hosts.load_host``.
        transform: Used instead of the host's: PIL image to ``(3, H, W)``.
        tokenize: Used instead of the host's: captions to ``(B, L)`` ids.
        batch_size: Samples a batch on one rank.
        workers: Processes that read and decode.
        epoch_samples: Samples of all ranks together that make a training epoch; as many as the shards hold where
            None (their headers are then read once).
        shuffle: Samples in the shuffle buffer of each worker.
        augment: Whether training uses the host's training transform.
        seed: Of all orders.
        caption_field: Field of ``json`` that holds the caption; empty: ``txt``, or ``json``'s ``caption``.
        fault_limit: Largest share of samples that may be dropped, judged after 1,000 and at the end.
        allow_random: Accept a host whose files lack weights, with random ones in their place.
        host_options: Options that the host is loaded with, which become part of its name (docs/how-to/hosts.md).
        pin_memory: Whether batches arrive in pinned memory; where None, if there is a CUDA device.
    """

    def __init__(
        self,
        train: Sources | None = None,
        val: Sources | None = None,
        host: str | None = None,
        transform: Callable | None = None,
        tokenize: Callable | None = None,
        batch_size: int = 256,
        workers: int = 2,
        epoch_samples: int | None = None,
        shuffle: int = 2000,
        augment: bool = False,
        seed: int = 0,
        caption_field: str = "",
        fault_limit: float = FAULT_LIMIT,
        allow_random: bool = False,
        host_options: dict[str, Any] | None = None,
        pin_memory: bool | None = None,
    ) -> None:
        super().__init__()
        if host is None and transform is None and tokenize is None:
            raise InputError("ImageTextDataModule needs a host, or a transform or tokenize of its own; none was given.")
        self.train, self.val, self.transform, self.tokenize = train, val, transform, tokenize
        self.host = with_options(host, host_options or {}) if host else host
        self.batch_size, self.workers, self.epoch_samples = batch_size, workers, epoch_samples
        self.shuffle, self.augment, self.seed, self.caption_field = shuffle, augment, seed, caption_field
        self.fault_limit, self.allow_random, self.pin_memory = fault_limit, allow_random, pin_memory
        self._transforms: dict[bool, Callable | None] | None = None

    @cached_property
    def d_in(self) -> int:
        """Width of the host's shared embedding space (0 without a host); needs no weights."""
        return embed_width(self.host) if self.host else 0

    @property
    def modalities(self) -> tuple[str, ...]:
        """What a batch holds."""
        if self.host is not None:
            return host_modalities(self.host)
        return tuple(m for m, given in ((IMAGE, self.transform), (TEXT, self.tokenize)) if given is not None)

    @property
    def sites(self) -> dict[str, Site]:
        """None: samples are not activations of any site yet."""
        return {}

    def setup(self, stage: str | None = None) -> None:
        """Get transform and tokenizer from the host, once."""
        if self._transforms is not None:
            return
        self._transforms = {True: self.transform, False: self.transform}
        if self.host is not None and (self.transform is None or self.tokenize is None):
            host = load_host(self.host, allow_random=self.allow_random)
            if self.transform is None:
                self._transforms = {train: host.transform(train) for train in (True, False)}
            if self.tokenize is None and TEXT in self.modalities:
                self.tokenize = host.tokenize

    def train_dataloader(self) -> TrainLoader:
        """Epochs of the endless stream.

        Raises:
            InputError: If there are no training shards, or fewer than ranks.
        """
        if self.train is None:
            raise InputError("ImageTextDataModule was given no shards to train on (its argument train is missing).")
        samples = self.epoch_samples
        if samples is None:
            samples = sum(count_samples(source.pattern) for source in as_sources(self.train))
        return self._pipeline(self.train, True, epoch_samples=samples)

    def val_dataloader(self) -> ExactLoader | list:
        """One exact pass, or nothing where there are no validation shards."""
        return [] if self.val is None else self._pipeline(self.val, False)

    test_dataloader = predict_dataloader = val_dataloader

    def _pipeline(self, sources: Sources, train: bool, epoch_samples: int | None = None) -> TrainLoader | ExactLoader:
        self.setup()
        return make_pipeline(
            sources,
            self._transforms[train and self.augment],
            self.tokenize,
            self.batch_size,
            train=train,
            seed=self.seed,
            shuffle=self.shuffle,
            workers=self.workers,
            epoch_samples=epoch_samples,
            rank=self.trainer.global_rank if self.trainer else 0,
            world=self.trainer.world_size if self.trainer else 1,
            fault_limit=self.fault_limit,
            caption_field=self.caption_field,
            pin_memory=torch.cuda.is_available() if self.pin_memory is None else self.pin_memory,
        )
