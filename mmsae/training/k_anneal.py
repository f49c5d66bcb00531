"""The number of latents a row falls from many to k over the first part of a training."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from mmsae.types import InputError


class KAnneal(Callback):
    """k falls linearly to the selector's own over the first steps, so that few latents die early (arXiv 2406.04093).

    Args:
        start: k of the first step; default: the width of the activations, at most the number of latents.
        share: Share of the training after which k is the selector's own.
    """

    each_member = True

    def __init__(self, start: int | None = None, share: float = 0.1) -> None:
        if not 0 < share <= 1 or (start is not None and start < 1):
            raise InputError(f"share must be above 0 and at most 1, start at least 1: not {share} and {start}")
        self.start, self.share = start, share
        self.end: float | None = None

    def setup(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        """Keep the k of the recipe, before a checkpoint brings an annealed one.

        Raises:
            InputError: The selector has no k, or starts at fewer latents than it ends with.
        """
        selector = module.sae.selector
        if not hasattr(selector, "set_k"):
            raise InputError(f"k cannot be annealed: selector {selector.name!r} has none")
        if self.end is None:
            self.end = selector.k

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Set k for the step."""
        sae = module.sae
        most = (sae.shard or sae).d_sae - getattr(sae.selector, "strict", False)
        start = min(self.start or max(sae.d_in.values()), most)
        if start < self.end:
            raise InputError(f"k is annealed from many to few, not from {start} to {self.end:g}")
        done = min(1.0, trainer.global_step / (self.share * module.total_steps))
        k = start + (self.end - start) * done
        k = round(k) if isinstance(self.end, int) else k
        if k != sae.selector.k:
            sae.selector.set_k(k)
