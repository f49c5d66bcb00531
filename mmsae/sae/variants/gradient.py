"""Gradient SAE (g-SAE, arXiv 2411.10397): latents are chosen by their effect on the host's loss as well as by size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmsae.sae.normaliser import all_reduce
from mmsae.sae.precodes import Score
from mmsae.sae.selector import SelectContext, TopK
from mmsae.types import InputError

WITHOUT = ("topk", "refuse")


class GradientTopK(TopK):
    """TopK that ranks by ``u * (1 + beta * |g D.T|)``, g the gradient of the host's loss at the row; values stay u.

    To first order, ablating a latent of value z and atom d changes that loss by ``-z <d, g>``. The gradient comes with
    the data (``Tokens.grad``), is divided by a running mean norm of its modality's gradients, and nothing is
    differentiated through it or through the atoms in the ranking. A row whose gradient is 0 (padding, a last token) is
    coded as by TopK, and does not count in the mean. [R] The text that was available names the term, not the sum
    ``1 + ...``, nor the unit of g, nor beta.

    A gradient knows the target of the loss: do not compare reconstructions chosen with it to those chosen without.

    Args:
        k: Latents kept a row.
        beta: Weight of a gradient of mean norm along an atom of norm 1; 0: TopK.
        without: What is done after training with rows that have no gradient: ``topk`` ranks them by u, ``refuse``
            refuses them. In training they are always refused.
        decay: Of the running mean norms, for every step.
    """

    name = "gradient_topk"

    def __init__(self, k: int = 32, beta: float = 1.0, without: str = "refuse", decay: float = 0.99) -> None:
        super().__init__(k)
        if beta < 0 or not 0 <= decay < 1:
            raise InputError(f"beta must be at least 0 and decay lie in [0, 1), not {beta} and {decay}")
        if without not in WITHOUT:
            raise InputError(f"without must be one of {', '.join(WITHOUT)}, not {without!r}")
        self.beta, self.without, self.decay = beta, without, decay

    def config(self) -> dict[str, Any]:
        return {"k": self.k, "beta": self.beta, "without": self.without, "decay": self.decay}

    def build(self, d_sae: int, modalities: Sequence[str]) -> None:
        """Check k; allocate the bias-corrected mean norms, ``mean = sum / weight`` of every modality."""
        super().build(d_sae, modalities)
        self.modalities = tuple(modalities)
        self.register_buffer("sum_", torch.zeros(len(modalities)))
        self.register_buffer("weight_", torch.zeros(len(modalities)))

    def score(self, rows: SelectContext) -> Score | None:
        if rows.grad is None and (self.training or self.without == "refuse"):
            when = "train" if self.training else "code with without='refuse'"
            raise InputError(
                f"selector {self.name!r} needs gradients of the host's loss to {when}, and these {rows.modality} rows "
                "have none"
            )
        if rows.grad is None or self.beta == 0:
            return None
        i = self.modalities.index(rows.modality)
        if self.training:
            self._observe(i, rows.grad)
        unit = self.beta / (self.sum_[i] / self.weight_[i]).clamp(min=1e-30)
        atoms, grad = rows.dictionary.rows().detach(), rows.grad.detach() * torch.where(self.weight_[i] > 0, unit, 0.0)
        return lambda u, part: (grad[part] @ atoms.T).abs_().add_(1).mul_(u)  # of some rows only, (n, d_sae)

    @torch.no_grad()
    def _observe(self, i: int, grad: Tensor) -> None:
        norm = grad.norm(dim=1)
        total, n = norm.sum().to(self.sum_.dtype), (norm > 0).sum()
        all_reduce(total, n)
        decay = torch.where(n > 0, self.decay, 1.0)
        self.sum_[i] = decay * self.sum_[i] + (1 - decay) * total / n.clamp(min=1)
        self.weight_[i] = decay * self.weight_[i] + (1 - decay)
