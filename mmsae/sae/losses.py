"""Loss terms. All are taken in normalised units, so that coefficients do not depend on the host's scale.

A term is called as ``term(outputs, ctx)`` with ``outputs = {modality: SAEOutput}`` and returns a scalar that already
carries its coefficient; a sum of terms is the training loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmsae.kernels import backend_for, decode_largest_each
from mmsae.kernels.pairs import code_cosine
from mmsae.sae.part import refuse_unpaired
from mmsae.sae.precodes import columns_below
from mmsae.sae.usage import DEAD_AFTER, UsageTracker
from mmsae.types import Codes, InputError, SAEOutput

Outputs = Mapping[str, SAEOutput]


class LossContext(NamedTuple):
    """What loss terms may look at beside the outputs."""

    sae: Any  #: The SAE (:class:`mmsae.SAE`).
    usage: UsageTracker | None = None  #: None where nobody tracks.
    progress: float = 1.0  #: Share of the training that is done, 0 to 1 (1 where it is not known: every ramp is over).
    step: int = 0  #: Number of optimiser steps done.
    seed: int = 0  #: Of the training; with the step, what random choices of a term are drawn from.

    def generator(self, salt: int) -> torch.Generator:
        """A generator on the CPU that is the same for this step on all ranks; ``salt`` keeps terms apart."""
        return torch.Generator().manual_seed((self.seed * 1_000_003 + self.step) * 1_009 + salt)

    def ramp(self, share: float) -> float:
        """0 to 1 over the first ``share`` of the training, then 1."""
        return min(1.0, self.progress / share) if share else 1.0


class LossTerm(nn.Module):
    """Base of loss terms; ``name`` is the name in logs."""

    name: str
    sparsity = False  #: Whether the term penalises that latents fire, or how much.
    least_modalities = 1  #: How many modalities the term compares at least.

    def check(self, sae: Any) -> None:
        """Refuse an SAE for which the term has no meaning; asked when a training is composed.

        Raises:
            InputError: It names the term and the part that do not go together.
        """
        if len(sae.modalities) < self.least_modalities:
            raise InputError(
                f"loss {self.name!r} compares {self.least_modalities} modalities, this SAE has {list(sae.modalities)}"
            )
        if self.sparsity and sae.encoder.sets_frequency:
            raise InputError(
                f"encoder {sae.encoder.name!r} sees to how often latents fire: loss {self.name!r} would act against it"
            )

    def build(self, sae: Any) -> None:
        """Allocate what the term keeps from step to step, in buffers, for an SAE that has its sizes."""

    def pair(self, outputs: Outputs) -> tuple[Codes, Codes]:
        """The codes of pairs, row by row.

        Raises:
            InputError: The outputs are not those of two modalities with equal counts.
        """
        refuse_unpaired(self.name, {m: out.codes.n for m, out in outputs.items()})
        a, b = (out.codes for out in outputs.values())
        return a, b

    def forward(self, outputs: Outputs, ctx: LossContext) -> Tensor:
        """Scalar loss, coefficient included."""
        raise NotImplementedError


def mean_square(recon: Tensor, target: Tensor) -> Tensor:
    """Mean over all entries of ``(recon - target)^2``, ``(N, d)`` both: two operations, and one of their gradients."""
    return torch.ops.aten.mse_loss.default(recon, target)


def total(terms: Sequence[Tensor]) -> Tensor:
    """The sum of loss terms, one at least."""
    first, *others = terms
    for term in others:
        first = first + term
    return first


class Reconstruction(LossTerm):
    """Squared error of the normalised rows.

    Args:
        reduction: ``fvu``: mean over modalities of error / total variance of the modality (the unit in which the
            other coefficients are stated); ``mse``: mean over rows and features, summed over modalities (VL-SAE's);
            ``sum``: summed over features, mean over rows, mean over modalities.
    """

    name = "reconstruction"

    def __init__(self, reduction: str = "fvu"):
        super().__init__()
        if reduction not in ("fvu", "mse", "sum"):
            raise InputError(f"reconstruction reduction must be 'fvu', 'mse' or 'sum', not {reduction!r}")
        self.reduction = reduction

    def forward(self, outputs: Outputs, ctx: LossContext) -> Tensor:
        error = total([self.of(out, m, ctx) for m, out in outputs.items()])
        return error if self.reduction == "mse" or len(outputs) == 1 else error / len(outputs)

    def of(self, out: SAEOutput, modality: str, ctx: LossContext) -> Tensor:
        """The error of one modality."""
        return self.error(out.target, out.recon, modality, ctx)

    def error(self, target: Tensor, recon: Tensor, modality: str, ctx: LossContext) -> Tensor:
        """The error of a reconstruction, ``(N, d)`` both."""
        error = mean_square(recon, target)
        if self.reduction == "mse":
            return error
        error = error * target.shape[1]
        return error / ctx.sae.normaliser.variance(modality) if self.reduction == "fvu" else error


class AuxK(LossTerm):
    """Dead latents are trained to explain the residual (arXiv 2406.04093, appendix A.2).

    ``coefficient * ||e - z_dead D||^2 / E||e - mean(e)||^2`` with ``e = stopgrad(target - recon)`` and no decoder bias:
    the target is a residual. Of the latents, only dead ones get gradients (so does the bias taken off the input).
    Where codes have signs (AbsTopK), dead pre-codes are ranked by their absolute value and keep their sign.

    Args:
        coefficient: Weight of the term.
        k_aux: Dead latents used a row (default: d_in / 2, at most the number of dead ones).
        dead_after: Tokens without firing on any modality after which a latent counts as dead; default: the bound of
            the training (``model.dead_after``), 1,000,000 where there is none.
        score: What dead latents are ranked by: ``value``, their positive pre-codes, or ``abs``; default: ``abs`` where
            the SAE's codes have signs.
    """

    name = "auxk"

    def __init__(
        self,
        coefficient: float = 1 / 32,
        k_aux: int | None = None,
        dead_after: int | None = None,
        score: str | None = None,
    ):
        super().__init__()
        if score not in (None, "value", "abs"):
            raise InputError(f"auxk's score must be 'value' or 'abs', not {score!r}")
        self.coefficient, self.k_aux, self.dead_after, self.score = coefficient, k_aux, dead_after, score

    def members(self, outputs: Outputs, ctx: LossContext) -> Tensor | None:
        """``(n,)`` ids of the latents that are trained, here the dead ones; None where it is not known."""
        return None if ctx.usage is None else ctx.usage.dead_ids(self.dead_after or DEAD_AFTER)

    def forward(self, outputs: Outputs, ctx: LossContext) -> Tensor:
        """Scalar loss; 0 without dead latents or without a tracker."""
        zero = next(iter(outputs.values())).recon.new_zeros(())
        if self.coefficient == 0 or (dead := self.members(outputs, ctx)) is None:
            return zero
        n = (
            len(dead)
            if ctx.sae.shard is None
            else int(ctx.sae.shard.total(torch.tensor(len(dead), device=dead.device)))
        )
        if n == 0:
            return zero
        terms = [self._term(outs, dead, n, ctx) for outs in self._passes(outputs, ctx, zero)]
        return total(terms) * (self.coefficient / len(outputs))

    def _passes(self, outputs: Outputs, ctx: LossContext, like: Tensor) -> list[dict[str, SAEOutput]]:
        """The modalities that are coded together: all, where a GPU waits for its host otherwise; else one at a time."""
        together = ctx.sae.shard is None and backend_for(like).fused
        return [dict(outputs)] if together else [{m: out} for m, out in outputs.items()]

    def _term(self, outs: dict[str, SAEOutput], dead: Tensor, n: int, ctx: LossContext) -> Tensor:
        """The errors of some modalities, each in the unit of its residual, summed."""
        shard = ctx.sae.shard
        pre = columns_below([out.pre for out in outs.values()], dead) if len(dead) else None
        if pre is None and len(outs) > 1:
            return total([self._term({m: out}, dead, n, ctx) for m, out in outs.items()])
        with torch.no_grad():
            residual = [out.target - out.recon for out in outs.values()]
            e = residual[0][None] if len(residual) == 1 else torch.stack(residual)
            unit = (e - e.mean(1, keepdim=True)).square().mean((1, 2))
            # a residual without variance (one row) has no unit: no term, and no gradient (0 / 0 would be NaN)
            unit = unit.masked_fill(unit <= 0, torch.inf)
        signed = self.score == "abs" or (self.score is None and ctx.sae.signed)
        k = min(self.k_aux or e.shape[2] // 2, n)
        atoms = [ctx.sae.dictionary(m).rows().index_select(0, dead) for m in outs]
        if shard is None:
            decoded = decode_largest_each(pre, k, atoms, signed)
        else:
            pre = residual[0].new_zeros(len(residual[0]), 0) if pre is None else pre
            decoded = [shard.decode_largest(pre, k, atoms[0], signed)]
        pairs = zip(decoded, residual, unit, strict=True)
        return total([mean_square(found, wanted) / by for found, wanted, by in pairs])


class CodeCosine(LossTerm):
    """``coefficient * (1 - mean cosine of the two codes of a pair)``: the default coupling (SAE-A with ``mask_top=1``).

    Published coefficients sit on mean-squared-error losses and do not carry over: this one is in FVU units, where .1 to
    .3 is a plateau on the generated world and 1 collapses onto hub latents (one latent that fires on everything makes
    every pair agree). Watch the cosine of shuffled pairs. Where text is poor (ten class names) and k is large, .1 and
    .03 collapsed too: a slot of the code is free to hold a constant that the decoder's bias takes away again.
    ``shuffled=0.5`` ends that: a constant then gains little (docs/results/first-results.md).

    Args:
        coefficient: Weight of the term.
        mask_top: 1 zeroes, in both codes, the largest latent of each of the two before comparing (arXiv 2602.06218).
        ramp: Share of the training over which the coefficient rises linearly from 0.
        shuffled: Weight, within the term, of the mean cosine of shuffled pairs (each row with the next row's partner),
            which is added. 0: pairs only.
    """

    name = "code_cosine"
    least_modalities = 2

    def __init__(self, coefficient: float = 0.1, mask_top: int = 0, ramp: float = 0.1, shuffled: float = 0.0):
        super().__init__()
        if mask_top not in (0, 1):
            raise InputError(f"mask_top must be 0 or 1, not {mask_top}")
        self.coefficient, self.mask_top, self.ramp, self.shuffled = coefficient, mask_top, ramp, shuffled

    def forward(self, outputs: Outputs, ctx: LossContext) -> Tensor:
        """Scalar loss, of two modalities with equal counts (pairs)."""
        a, b = self.pair(outputs)
        weight = self.coefficient * ctx.ramp(self.ramp)
        apart = 1.0 - code_cosine(a, b, mask_top=self.mask_top).mean()
        if self.shuffled:
            other = b.rows(torch.arange(b.n, device=b.values.device).roll(1))
            apart = apart + self.shuffled * code_cosine(a, other, mask_top=self.mask_top).mean()
        return weight * apart
