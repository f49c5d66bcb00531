"""Contrastive sparse representations (CSR, arXiv 2503.01776): codes that tell a row's partner from all other rows.

The whole method is TopK with Multi-TopK (:class:`mmsae.sae.NestedTopK`), AuxK and this term on non-negative codes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mmsae.kernels.pairs import unit_codes
from mmsae.sae.losses import LossContext, LossTerm, Outputs
from mmsae.sae.normaliser import all_reduce
from mmsae.types import Codes, InputError


class _Gather(torch.autograd.Function):
    """Rows of all ranks in order of the rank; gradients of all ranks come back to the rank that gave the row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, x.contiguous())
        ctx.n = len(x)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.contiguous()
        all_reduce(grad)
        return grad[torch.distributed.get_rank() * ctx.n :][: ctx.n]


def gather(codes: Codes) -> tuple[Codes, int]:
    """The codes of all ranks, which have equal numbers of rows, and where this rank's begin.

    Raises:
        InputError: Unequal numbers of rows.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return codes, 0
    sizes = torch.tensor([codes.n, -codes.n, codes.values.shape[1]], device=codes.values.device)
    all_reduce(sizes, op="max")
    most, least, width = sizes.tolist()
    if most != -least:
        raise InputError(f"codes are compared over ranks, which need equal numbers of rows, not {-least} to {most}")
    more = (0, width - codes.values.shape[1])  # thresholds may keep another number on each rank: zeros add nothing
    indices = None if codes.indices is None else _Gather.apply(F.pad(codes.indices, more))
    all_codes = codes._replace(values=_Gather.apply(F.pad(codes.values, more)), indices=indices, info=None)
    return all_codes, torch.distributed.get_rank() * codes.n


class CodeInfoNCE(LossTerm):
    """``coefficient * ramp *`` cross-entropy, both ways, that a row's partner has the code most like its own.

    Every other row of the batch is a negative, duplicates and captions that fit as well among them. On the generated
    world retrieval by codes gains, and concepts spread over latents of single scenes: weigh it lightly. It costs
    about twice what the cosine of pairs does.

    Args:
        coefficient: Weight of the term, beside a reconstruction in FVU units (published: 1 beside another unit).
        tau: Temperature.
        normalise: Whether cosines are compared; published are inner products at temperature 1, so that the scale of the
            rows is one.
        gather: Whether the rows of all ranks are compared, and not each rank's alone.
        ramp: Share of the training over which the coefficient rises linearly from 0.
    """

    name = "code_info_nce"
    least_modalities = 2

    def __init__(
        self,
        coefficient: float = 0.03,
        tau: float = 0.1,
        normalise: bool = True,
        gather: bool = True,
        ramp: float = 0.1,
    ) -> None:
        super().__init__()
        if tau <= 0:
            raise InputError(f"the temperature tau must be above 0, not {tau}")
        self.coefficient, self.tau, self.normalise, self.gather, self.ramp = coefficient, tau, normalise, gather, ramp

    def check(self, sae: Any) -> None:
        super().check(sae)
        if sae.signed:
            raise InputError(f"code_info_nce compares non-negative codes: those of {sae.selector.name!r} have signs")

    def forward(self, outputs: Outputs, ctx: LossContext) -> Tensor:
        """Scalar loss of pairs.

        Raises:
            InputError: Other than two modalities with equal counts, on one rank or between ranks.
        """
        a, b = self.pair(outputs)
        with torch.autocast(a.values.device.type, enabled=False):
            if self.normalise:
                a, b = unit_codes(a), unit_codes(b)
            loss = self._choice(a, b) + self._choice(b, a)
        return self.coefficient * ctx.ramp(self.ramp) * loss / 2

    def _choice(self, queries: Codes, keys: Codes) -> Tensor:
        """Cross-entropy of the partner of each query among all keys."""
        keys, first = gather(keys) if self.gather else (keys, 0)
        logits = queries.decode_with(keys.to_dense().T.contiguous()) / self.tau
        return F.cross_entropy(logits, torch.arange(first, first + queries.n, device=logits.device))
