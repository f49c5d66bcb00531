"""JumpReLU (arXiv 2407.14435): a learned threshold for every latent, trained through a straight-through estimator.

:class:`L0` is the paper's penalty; :class:`TanhL0` with :class:`PreActRevive` is Anthropic's (January 2025, "Dictionary
Learning Optimization Techniques").
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmsae.sae.losses import LossContext, LossTerm, Outputs
from mmsae.sae.selector import AnyPreCodes, SelectContext, Selected, Selector
from mmsae.sae.usage import DEAD_AFTER
from mmsae.types import InputError


class _Step(torch.autograd.Function):
    """``H(u - theta)``, with the pseudo-gradient ``-K((u - theta) / eps) / eps`` for theta; none for u."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, theta: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(u, theta)
        ctx.bandwidth = bandwidth
        return (u > theta).to(u.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        u, theta = ctx.saved_tensors
        near = ((u - theta).abs() < ctx.bandwidth / 2).to(grad.dtype)  # rectangle kernel
        return None, -(grad * near).sum(0) / ctx.bandwidth, None


def step(u: Tensor, theta: Tensor, bandwidth: float) -> Tensor:
    """``(N, F)`` of 0 and 1: ``u (N, F) > theta (F,)``, whose expectation can be minimised in theta."""
    return _Step.apply(u, theta, bandwidth)


class JumpReLU(Selector):
    """``z = u * 1[u > theta]`` with ``theta (d_sae,)`` for every latent; dense in training, sparse after it.

    In training ``dz/dtheta = -(theta / eps) K((u - theta) / eps)`` with the rectangle kernel K, summed over the rows
    [C: the paper's pseudo-code]; the step sees the pre-code, negative ones too (a bandwidth above ``2 theta`` would
    count every silent latent as near), and u itself gets gradients above theta only.

    Args:
        threshold: Initial theta, in the units of the normalised rows.
        bandwidth: eps, in the same units; it must be comparable to the spacing of pre-codes near theta.
        log: Whether ``log theta`` is trained, which keeps it positive; else theta itself, as imported models have it.
        per_modality: Whether every modality has thresholds of its own.
    """

    name = "jumprelu"

    def __init__(
        self, threshold: float = 0.001, bandwidth: float = 0.001, log: bool = True, per_modality: bool = False
    ) -> None:
        super().__init__()
        if bandwidth <= 0 or (log and threshold <= 0):
            raise InputError(f"threshold and bandwidth must be above 0, not {threshold} and {bandwidth}")
        self.start, self.bandwidth, self.log, self.per_modality = threshold, bandwidth, log, per_modality

    def config(self) -> dict[str, Any]:
        return {
            "threshold": self.start,
            "bandwidth": self.bandwidth,
            "log": self.log,
            "per_modality": self.per_modality,
        }

    def build(self, d_sae: int, modalities: Sequence[str]) -> None:
        """Allocate ``thresholds (1 or modalities, d_sae)``."""
        self.modalities = tuple(modalities)
        start = math.log(self.start) if self.log else self.start
        self.thresholds = nn.Parameter(torch.full((len(modalities) if self.per_modality else 1, d_sae), start))

    def threshold(self, modality: str) -> Tensor:
        """``(d_sae,)`` theta of a modality."""
        own = self.thresholds[self.modalities.index(modality) if self.per_modality else 0]
        return own.exp() if self.log else own

    def forward(self, pre: AnyPreCodes, rows: SelectContext) -> Selected:
        theta = self.threshold(rows.modality)
        if not self.training:
            linear, indices, on = pre.above(theta)
            return pre.at(indices, linear).relu() * on, indices
        u = pre.dense()
        # detached: d(u * H) / dtheta = -(theta / eps) K, as at u = theta
        jump = _Step.apply(u, theta, self.bandwidth)
        return u.relu() * (u > theta) + theta.detach() * (jump - jump.detach()), None


def _needs_jumprelu(term: LossTerm, sae: Any) -> None:
    if not isinstance(sae.selector, JumpReLU):
        named = f"{term.name} trains the thresholds of selector 'jumprelu'"
        raise InputError(f"{named}, this SAE has {sae.selector.name!r}")


class L0(LossTerm):
    """A penalty on the number of latents that fire, for :class:`JumpReLU` (arXiv 2407.14435).

    ``coefficient * ramp * E_rows f(sum_i H(u_i - theta_i))``, mean over modalities. Only thresholds get gradients.

    Args:
        coefficient: Weight of the term; its unit is that of the reconstruction term for every latent (``linear``).
        target: None: f is the identity; else f is ``(L0 / target - 1)^2`` of the mean L0 (dictionary_learning's form).
        ramp: Share of the training over which the coefficient rises linearly from 0.
    """

    name = "l0"
    sparsity = True

    def __init__(self, coefficient: float = 1e-3, target: float | None = None, ramp: float = 0.1) -> None:
        super().__init__()
        if target is not None and target <= 0:
            raise InputError(f"target L0 must be above 0, not {target}")
        self.coefficient, self.target, self.ramp = coefficient, target, ramp

    def check(self, sae: Any) -> None:
        _needs_jumprelu(self, sae)

    def forward(self, outputs: Outputs, ctx: LossContext) -> Tensor:
        """Scalar loss."""
        selector = ctx.sae.selector
        total = 0.0
        for m, out in outputs.items():
            count = step(out.pre.dense(), selector.threshold(m), selector.bandwidth).sum(1).mean()
            total = total + (count if self.target is None else (count / self.target - 1).square())
        return self.coefficient * ctx.ramp(self.ramp) * total / len(outputs)


class TanhL0(LossTerm):
    """``coefficient * ramp * E_rows sum_i tanh(c |z_i| ||d_i||)``, mean over modalities: an L0 that is smooth in z.

    Every weight gets gradients, the thresholds through the selector's straight-through estimator.

    Args:
        coefficient: Weight of the term; its unit is that of the reconstruction term for every latent.
        c: Steepness, in the units of the normalised rows. Published: 4 where the mean norm of a row is ``sqrt(d)``,
            which is ``4 sqrt(d)`` where it is 1.
        ramp: Share of the training over which the coefficient rises linearly from 0 (published: all of it).
    """

    name = "tanh_l0"
    sparsity = True

    def __init__(self, coefficient: float = 1e-3, c: float = 4.0, ramp: float = 1.0) -> None:
        super().__init__()
        if c <= 0:
            raise InputError(f"tanh_l0's steepness c must be above 0, not {c}")
        self.coefficient, self.c, self.ramp = coefficient, c, ramp

    def forward(self, outputs: Outputs, ctx: LossContext) -> Tensor:
        total = 0.0
        for m, out in outputs.items():
            norms = ctx.sae.dictionary(m).rows().norm(dim=1)
            codes = out.codes
            scaled = codes.values.abs() * (norms if codes.indices is None else norms[codes.indices])
            total = total + (self.c * scaled).tanh().sum(1).mean()
        return self.coefficient * ctx.ramp(self.ramp) * total / len(outputs)


class PreActRevive(LossTerm):
    """``coefficient * E_rows sum_dead [theta_i - u_i]+ ||d_i||`` in FVU units: dead latents are pulled to firing.

    It is divided by the root of the modality's total variance, and is the mean over modalities. Dictionaries get no
    gradient from it [R], which would only make dead atoms short.

    Args:
        coefficient: Weight of the term (published: 3e-6 of a squared error at a mean norm of ``sqrt(d)``).
        dead_after: Tokens without firing on any modality after which a latent counts as dead; default: the bound of
            the training (``model.dead_after``), 1,000,000 where there is none.
    """

    name = "preact_revive"

    def __init__(self, coefficient: float = 1e-4, dead_after: int | None = None) -> None:
        super().__init__()
        self.coefficient, self.dead_after = coefficient, dead_after

    def check(self, sae: Any) -> None:
        _needs_jumprelu(self, sae)

    def forward(self, outputs: Outputs, ctx: LossContext) -> Tensor:
        """Scalar loss; 0 without dead latents or without a tracker."""
        total = next(iter(outputs.values())).recon.new_zeros(())
        if ctx.usage is None:
            return total
        dead = ctx.usage.dead_ids(self.dead_after or DEAD_AFTER)
        if len(dead) == 0:
            return total
        for m, out in outputs.items():
            norms = ctx.sae.dictionary(m).rows()[dead].detach().norm(dim=1)
            below = (ctx.sae.selector.threshold(m)[dead] - out.pre.columns(dead)).relu() * norms
            total = total + below.sum(1).mean() / ctx.sae.normaliser.variance(m).sqrt()
        return self.coefficient * total / len(outputs)
