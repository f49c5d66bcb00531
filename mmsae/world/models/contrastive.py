"""CLIP's training: batches of pairs in memory, and a loss in which equal captions are equally right."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from mmsae.world.models import loop
from mmsae.world.models.options import Training
from mmsae.world.models.pairs import LoadedPairs, epoch_order, flip_and_shift


@dataclass(frozen=True)
class ClipTraining(Training):
    """How to train a CLIP."""

    photo: bool = False
    """Mirror and shift the images."""
    bf16: bool = False
    """Image tower under bfloat16 autocast."""


def pair_loss(image: Tensor, text: Tensor, caption: Tensor, scale: Tensor) -> Tensor:
    """CLIP's symmetric cross-entropy in which equal captions share the target.

    Equal to the loss over all B x B logits with targets spread evenly over equal captions, at the cost of the U
    different ones: a column that stands for c texts counts c times in the softmax. ``image (B, d)`` and ``text (U, d)``
    are unit embeddings, ``caption (B,)`` says which of the U each image has, ``scale`` is the inverse temperature.
    """
    logits = scale * image @ text.T  # (B, U)
    count = torch.bincount(caption, minlength=len(text)).to(logits)
    right = logits.gather(1, caption[:, None]).mean()
    to_text = torch.logsumexp(logits + count.log(), 1).mean()
    to_image = (count * torch.logsumexp(logits, 0)).sum() / len(image)
    return (to_text + to_image) / 2 - right


class _Batches:
    """Batch ``step`` of the run, the same whether or not the steps before it were taken."""

    def __init__(self, pairs: LoadedPairs, ids: Tensor, r: ClipTraining, device: torch.device) -> None:
        self.pairs, self.ids, self.r, self.device = pairs, ids, r, device
        self.per_epoch = len(pairs.images) // r.batch_size
        self.epoch, self.order = -1, np.empty(0, int)

    def __call__(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Images ``(B, 3, S, S)`` in [-2, 2], ``(U, L)`` tokens of the different captions, ``(B,)`` which of them."""
        p, r = self.pairs, self.r
        epoch, k = divmod(step, self.per_epoch)
        if epoch != self.epoch:
            self.epoch, self.order = epoch, epoch_order(p.group, r.seed, epoch)
        rows = self.order[k * r.batch_size : (k + 1) * r.batch_size]
        rng = np.random.default_rng([r.seed, 11, step])
        column = (rng.random(len(rows)) * p.counts[rows]).astype(int)
        texts, caption = np.unique(p.captions[rows, column], return_inverse=True)
        images = flip_and_shift(p.images[rows], rng) if r.photo else p.images[rows]
        x = torch.from_numpy(images).to(self.device).permute(0, 3, 1, 2)  # stays channels-last in memory
        x = x.float().sub_(127.5).div_(63.75)  # mean .5, std .25 of values in [0, 1]
        return x, self.ids[torch.from_numpy(texts)].to(self.device), torch.from_numpy(caption.ravel()).to(self.device)


def train(
    model: nn.Module,
    pairs: LoadedPairs,
    ids: Tensor,
    r: ClipTraining,
    state: loop.RunState | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Train an open_clip model in place, see :func:`.loop.train`; ``ids (U, L)`` are tokens of ``pairs.texts``."""
    device = model.logit_scale.device
    batches = _Batches(pairs, ids, r, device)

    def loss_of(step: int) -> Tensor:
        x, tokens, caption = batches(step)
        with torch.autocast(device.type, torch.bfloat16, enabled=r.bf16):
            image = model.encode_image(x)
        # The text tower stays in float32: at this size autocast makes it slower.
        text = normalize(model.encode_text(tokens), dim=1)
        return pair_loss(normalize(image.float(), dim=1), text, caption, model.logit_scale.exp())

    @torch.no_grad()
    def keep_scale(step: int) -> None:
        model.logit_scale.clamp_(0, math.log(100))

    opts = loop.optimizers(model.named_parameters(), ("embedding",), r)
    model.visual.to(memory_format=torch.channels_last)
    return loop.train(model.train(), opts, loss_of, r, "CLIP", after=keep_scale, state=state, progress=progress)
