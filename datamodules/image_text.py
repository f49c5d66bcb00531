"""Image-text shards as a LightningDataModule."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import lightning
import torch

from datamodules.options import Loading, Reading, ranks_of
from mmsae.hosts import as_encoder, embed_width, host_modalities
from mmsae.options import flat
from mmsae.shards import ExactLoader, Reader, Sources, TrainLoader
from mmsae.types import IMAGE, TEXT, InputError, Site


@flat
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
        augment: Whether training uses the host's training transform.
        seed: Seed of all orders.
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
        augment: bool = False,
        seed: int = 0,
        pin_memory: bool | None = None,
        reading: Reading = Reading(),
        loading: Loading = Loading(),
    ) -> None:
        super().__init__()
        if host is None and transform is None and tokenize is None:
            raise InputError("ImageTextDataModule needs a host, or a transform or tokenize of its own; none was given.")
        self.train, self.val, self.transform, self.tokenize = train, val, transform, tokenize
        self.host = loading.name(host) if host else host
        self.batch_size, self.augment, self.seed, self.pin_memory = batch_size, augment, seed, pin_memory
        self.reading, self.loading = reading, loading
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
            host = as_encoder(self.loading.load(self.host), "ImageTextDataModule")
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
        return self._pipeline(self.train, True, self.reading.epoch(self.train))

    def val_dataloader(self) -> ExactLoader | list:
        """One exact pass, or nothing where there are no validation shards."""
        return [] if self.val is None else self._pipeline(self.val, False)

    test_dataloader = predict_dataloader = val_dataloader

    def _pipeline(self, sources: Sources, train: bool, epoch: int | None = None) -> TrainLoader | ExactLoader:
        self.setup()
        transform = self._transforms[train and self.augment]
        about = {"caption_field": self.reading.caption_field, "keep": self.reading.uids}
        reader = Reader.of(transform, self.tokenize, self.batch_size, **about)
        pin_memory = torch.cuda.is_available() if self.pin_memory is None else self.pin_memory
        return self.reading.pipeline(sources, reader, epoch, self.seed, ranks_of(self.trainer), pin_memory)
