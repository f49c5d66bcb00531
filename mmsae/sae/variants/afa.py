"""top-AFA (arXiv 2503.24277): each row has as many latents as make the norm of its code that of the row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmsae.kernels.pairs import code_norm
from mmsae.sae.losses import LossContext, LossTerm, Outputs
from mmsae.sae.selector import AnyPreCodes, SelectContext, Selected, Selector
from mmsae.types import InputError


def _check_norms(what: str, sae: Any) -> None:
    """Refuse rows that all have one norm, from which no row can learn how many latents it needs."""
    n = sae.normaliser
    if n.unit_out or (n.unit_in and not n.centre):
        said = f"unit_in {n.unit_in}, centre {n.centre}, unit_out {n.unit_out}"
        raise InputError(f"{what} goes by the norm of each row, which the normaliser ({said}) makes the same for all")


class EnergyTopK(Selector):
    """The first k entries of each row by energy ``(u_i |d_i|)^2``, with the k whose norm is nearest to the row's.

    ``k = argmin_j | sqrt(sum of the j largest energies) - |x - b_dec| |``, at least 1; a row whose whole energy is too
    little keeps every positive pre-code. It needs no k, couples no rows and is the same in evaluation, but it is not
    very sparse (published: about 2,000 of 12,288). Codes are dense in training, sparse after it.
    """

    name = "energy_topk"
    by_norm = True

    def check(self, sae: Any) -> None:
        _check_norms(f"selector {self.name!r}", sae)

    def forward(self, pre: AnyPreCodes, rows: SelectContext) -> Selected:
        u = pre.dense().relu()
        with torch.no_grad():
            bias = rows.dictionary.bias
            target = (rows.target if bias is None else rows.target - bias).norm(dim=1, keepdim=True)
            energy, order = (u * rows.dictionary.rows().norm(dim=1)).square().float().sort(dim=1, descending=True)
            total = energy.cumsum(1)
            # the first prefix that reaches the target, or the one before: differences of all would be lost in rounding
            reach = (total < target.square()).sum(1, keepdim=True)
            last = reach.clamp(max=u.shape[1] - 1)
            before = (last - 1).clamp(min=0)
            nearer = target - total.gather(1, before).sqrt() < total.gather(1, last).sqrt() - target
            last = torch.where(nearer, before, last)
            on = (torch.arange(u.shape[1], device=u.device) <= last) & (energy > 0)
            if self.training:
                on = torch.zeros_like(on).scatter_(1, order, on)
            else:
                width = max(1, int(on.sum(1).max())) if len(on) else 1
                on, order = on[:, :width], order[:, :width]
        value = getattr(pre, "value", None)
        value = u if value is None else value
        return (value * on, None) if self.training else (value.gather(1, order) * on, order)


class NormMatch(LossTerm):
    """The AFA loss: ``coefficient * E_rows (|f| - |x|)^2 / variance`` with ``f_i = z_i |d_i|``, mean over modalities.

    Atoms that are nearly orthogonal give a reconstruction whose norm is that of f. In FVU units: the paper's gamma,
    1/128 to 1/16, stands beside an error that is averaged over the d features of standardised rows, so it is
    ``gamma * d`` here (24 for 1/32 and d = 768). Norms of atoms count as constants.

    Args:
        coefficient: Weight of the term.
        subtract_bias: Whether the decoder's bias is taken off x first, as :class:`EnergyTopK` does [R]; the published
            code compares with x itself.
    """

    name = "norm_match"

    def __init__(self, coefficient: float = 1.0, subtract_bias: bool = True) -> None:
        super().__init__()
        self.coefficient, self.subtract_bias = coefficient, subtract_bias

    def check(self, sae: Any) -> None:
        super().check(sae)
        _check_norms(f"loss {self.name!r}", sae)

    def forward(self, outputs: Outputs, ctx: LossContext) -> Tensor:
        total = 0.0
        for m, out in outputs.items():
            dictionary = ctx.sae.dictionary(m)
            x = out.target - dictionary.bias if self.subtract_bias and dictionary.bias is not None else out.target
            gap = code_norm(out.codes, dictionary.rows().detach().square().sum(1)) - x.norm(dim=1)
            total = total + gap.square().mean() / ctx.sae.normaliser.variance(m)
        return self.coefficient * total / len(outputs)
