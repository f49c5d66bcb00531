"""MonoLoss (arXiv 2602.12403): latents are rewarded for firing on rows that are alike."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mmsae.kernels import sparse_scatter
from mmsae.sae.losses import LossContext, LossTerm, Outputs
from mmsae.types import Codes, InputError


def _sums(codes: Codes, values: Tensor) -> Tensor:
    """``(d_sae,)`` sums over rows of values that stand where those of the codes do."""
    if codes.indices is None:
        return values.sum(0)
    return values.new_zeros(codes.d_sae).index_add(0, codes.indices.flatten(), values.flatten())


def batch_monosemanticity(codes: Codes, rows: Tensor) -> Tensor:
    """Monosemanticity of each latent over a batch, differentiable in the codes; NaN where fewer than two rows fire.

    ``sum_{n<m} a_n a_m <e_n, e_m> / sum_{n<m} a_n a_m`` with unit rows e and code values a minus the latent's smallest
    (scaling to [0, 1] cancels), in linear time; :class:`mmsae.metrics.concepts.monosemanticity.Monosemanticity` is the
    same over a data set.

    Args:
        codes: Non-negative codes of N rows.
        rows: ``(N, d)``.
    """
    e = F.normalize(rows.detach(), dim=1)
    fired = _sums(codes, (codes.values.detach() > 0).to(e.dtype))
    dense = codes.indices is None
    if dense:
        low = codes.values.detach().amin(0)
    else:
        low = torch.full_like(fired, torch.inf).to(codes.values.dtype)
        low.scatter_reduce_(0, codes.indices.flatten(), codes.values.detach().flatten(), "amin")
    low = torch.where(fired == codes.n, low, 0.0)  # of others the smallest value is that of rows they do not fire on
    a = (codes.values - (low if dense else low[codes.indices])) * (codes.values > 0)
    first, second = _sums(codes, a), _sums(codes, a.square())
    weighted = a.T @ e if dense else sparse_scatter(a, codes.indices, e, codes.d_sae)
    pairs = first.square() - second
    known = pairs > 1e-6 * first.square()
    score = (weighted.square().sum(1) - second) / torch.where(known, pairs, 1.0)
    return torch.where(known, score, torch.nan)


class MonoScore(LossTerm):
    """``coefficient * ramp * (1 - mean monosemanticity of the batch's latents)``, mean over modalities.

    Alike are rows whose inputs are: what an SAE was trained to have is no evidence that it has it. Judge by the
    similarity of another encoder. Latents that fire on fewer than two rows of the batch do not count; each rank sees
    its own batch.

    Args:
        coefficient: Weight of the term, beside a reconstruction in FVU units. [R]: the published 3e-4 is about .4 if it
            sits beside a mean over the features of unit rows of width 768.
        ramp: Share of the training over which the coefficient rises linearly from 0.
    """

    name = "mono_score"

    def __init__(self, coefficient: float = 0.3, ramp: float = 0.1) -> None:
        super().__init__()
        self.coefficient, self.ramp = coefficient, ramp

    def check(self, sae: Any) -> None:
        super().check(sae)
        if sae.signed:
            raise InputError(f"mono_score is of non-negative codes: those of {sae.selector.name!r} have signs")

    def forward(self, outputs: Outputs, ctx: LossContext) -> Tensor:
        """Scalar loss; a modality without a latent that fires twice adds nothing."""
        total = 0.0
        for out in outputs.values():
            score = batch_monosemanticity(out.codes, out.target)
            known = ~score.isnan()
            apart = torch.where(known, 1.0 - score, 0.0).sum() / known.sum().clamp(min=1)
            total = total + apart
        return self.coefficient * ctx.ramp(self.ramp) * total / len(outputs)
