"""Losses of embeddings: what an encoder was trained on, or is used for."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmsae.hosts.gradient import HostLoss
from mmsae.types import IMAGE, TEXT, ImageTextBatch, InputError


def contrastive(host: Any, batch: ImageTextBatch) -> Tensor:
    """``(B,)`` or ``(B, B)`` terms of the image-text loss of an encoder, by its own scale (and bias).

    CLIP (arXiv 2103.00020): the mean of both directions' cross-entropies, for every item. SigLIP (arXiv 2303.15343),
    which has a bias: one logistic term for every image and text of the batch. Items of a batch are each other's
    negatives, so that gradients depend on the batch, and equal captions in it count as wrong ones.
    """
    if batch.images is None or batch.texts is None:
        raise InputError("gradient contrastive: the batch needs images and texts, it lacks one of them.")
    image, text = (F.normalize(host.embed(m, x), dim=-1) for m, x in ((IMAGE, batch.images), (TEXT, batch.texts)))
    logits = host.logit_scale * image @ text.T
    if host.logit_bias is not None:
        sign = 2 * torch.eye(len(logits), device=logits.device) - 1
        return -F.logsigmoid(sign * (logits + host.logit_bias))
    own = torch.arange(len(logits), device=logits.device)
    return sum(F.cross_entropy(side, own, reduction="none") for side in (logits, logits.T)) / 2


CONTRASTIVE = HostLoss("contrastive", contrastive, (IMAGE, TEXT))


class LinearHead(NamedTuple):
    """Cross-entropy of a linear classifier of an encoder's image embeddings.

    A zero-shot one has the scaled unit embeddings of its classes' captions as weights, and ``unit=True``.
    """

    weight: Tensor  #: ``(C, d)``.
    bias: Tensor | None = None  #: ``(C,)``.
    unit: bool = False  #: Whether embeddings are brought to unit norm first.

    def objective(self) -> HostLoss:
        """The loss, which takes the samples' class numbers (``cls``) for right."""
        return HostLoss("classifier", self.terms, (IMAGE,), labels=True)

    def terms(self, host: Any, batch: ImageTextBatch) -> Tensor:
        """``(B,)`` cross-entropies."""
        if batch.images is None or batch.labels is None:
            raise InputError("gradient classifier: the batch needs images and class numbers, it lacks one of them.")
        if not 0 <= int(batch.labels.min()) <= int(batch.labels.max()) < len(self.weight):
            wrong = next(int(c) for c in batch.labels if not 0 <= c < len(self.weight))
            raise InputError(
                f"gradient classifier: a sample has class {wrong}, the head has {len(self.weight)} classes."
            )
        x = host.embed(IMAGE, batch.images)
        x = F.normalize(x, dim=-1) if self.unit else x
        bias = None if self.bias is None else self.bias.to(x)
        return F.cross_entropy(F.linear(x, self.weight.to(x), bias), batch.labels.to(x.device), reduction="none")
