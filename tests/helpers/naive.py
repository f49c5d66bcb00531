"""SAEs as dense formulas in double precision: what sparse kernels and their gradients are compared with.

Of the real run only what no gradient passes through is taken: which entries were kept, the noise of vSAE, and the
coefficients that a least-squares pursuit has fitted.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor

from mmsae import SAE
from mmsae.sae import AuxK, DensePreCodes, LossContext, NestedTopK
from mmsae.types import Codes, SAEOutput


def atoms(sae: SAE, modality: str) -> Tensor:
    """``(d_sae, d)``."""
    d = sae.dictionary(modality)
    if d.name == "scaled":
        return d.scale[:, None] * d.weight
    if d.name == "archetypal":
        return d.scale.exp() * (d.mix @ d.points + d.relax)
    return d.weight


def pre_codes(sae: SAE, out: SAEOutput, modality: str) -> DensePreCodes:
    """What is ranked, what is kept of it, and what losses want to know beside it."""
    e, d, x = sae.encoder, sae.dictionary(modality), out.target
    e = e.encoders[modality] if e.name == "per_modality" else e
    centred = x if d.bias is None else x - d.bias
    if e.name == "affine":
        return DensePreCodes((centred if e.subtract_decoder_bias else x) @ e.weight.T + e.bias)
    if e.name == "distance":
        xn, wn = (t / t.square().sum(1, keepdim=True).sqrt() for t in (x, e.weight))
        return DensePreCodes(2 - (xn[:, None] - wn[None]).square().sum(2).sqrt())
    if e.name == "gba":
        return DensePreCodes(centred @ d.weight.T + e.bias[0])
    if e.name == "gated":
        p = centred @ e.weight.T
        return DensePreCodes(p + e.b_gate, (e.r_mag.exp() * p + e.b_mag).relu())
    if e.name == "gaussian":
        mean, log_variance = (centred @ e.weight.T + e.bias).relu(), None
        value = mean
        if e.learned_variance:
            log_variance = (centred @ e.spread.T + e.spread_bias).clamp(-6, 2)
            real = out.pre.extras
            noise = (out.pre.value - real["mean"]) / (real["log_variance"] / 2).exp()
            value = mean + (log_variance / 2).exp() * noise.detach()
        return DensePreCodes(mean, value, {"mean": mean, "log_variance": log_variance})
    if e.name == "pursuit":
        codes = pursued(centred, atoms(sae, modality), e.steps, e.sign) if e.kind == "mp" else out.codes.to_dense()
        left = (centred - codes @ atoms(sae, modality)).detach()
        return DensePreCodes(left @ atoms(sae, modality).T, codes)
    raise NotImplementedError(e.name)


def pursued(x: Tensor, d: Tensor, steps: int, sign: str) -> Tensor:
    """``(N, d_sae)`` matching pursuit by its definition."""
    codes, left = x.new_zeros(len(x), len(d)), x
    for _ in range(steps):
        c = left @ d.T
        best = (c.abs() if sign == "abs" else c).argmax(1, keepdim=True)
        value = c.gather(1, best)
        value = value.relu() if sign == "relu" else value
        codes = codes + torch.zeros_like(codes).scatter(1, best, value)
        left = left - value * d[best[:, 0]]
    return codes


def outputs(sae: SAE, real: dict[str, SAEOutput]) -> dict[str, SAEOutput]:
    """Dense outputs that have the kept entries of real ones."""
    found = {}
    for m, out in real.items():
        pre, kept = pre_codes(sae, out, m), (out.codes.to_dense() != 0).detach()
        z = (pre.u if pre.value is None else pre.value) * kept
        recon = z @ atoms(sae, m)
        bias = sae.dictionary(m).bias
        recon = recon if bias is None else recon + bias
        found[m] = SAEOutput(recon, Codes(z, None, sae.d_sae, m), out.target, recon, pre)
    return found


def auxk(term: AuxK, dense: dict[str, SAEOutput], ctx: LossContext) -> Tensor:
    """Of the latents that the term trains, the largest pre-codes against the residual."""
    dead, total = torch.zeros(ctx.sae.d_sae, dtype=torch.bool).index_fill(0, term.members(dense, ctx), True), 0.0
    for m, out in dense.items():
        left = (out.target - out.recon).detach()
        u = out.pre.u * dead if ctx.sae.signed else out.pre.u.relu() * dead
        size = torch.where(dead, u.detach().abs(), -1.0)
        k = min(term.k_aux or left.shape[1] // 2, int(dead.sum()))
        u = u * torch.zeros_like(u).scatter(1, size.topk(k).indices, 1.0)
        error = (left - u @ atoms(ctx.sae, m)).square().sum(1).mean()
        total = total + error / (left - left.mean(0)).square().sum(1).mean()
    return term.coefficient * total / len(dense)


def nested_topk(term: NestedTopK, dense: dict[str, SAEOutput], ctx: LossContext) -> Tensor:
    """Errors of the reconstructions by the largest of all positive pre-codes."""
    ks = [math.ceil(multiple * ctx.sae.selector.k) for multiple in term.multiples]
    weights, total = term.given or [1 / len(ks)] * len(ks), 0.0
    for m, out in dense.items():
        u = out.pre.u.relu()
        for k, weight in zip(ks, weights, strict=True):
            z = u * torch.zeros_like(u).scatter(1, u.detach().topk(k).indices, 1.0)
            error = (out.target - z @ atoms(ctx.sae, m) - ctx.sae.dictionary(m).bias).square().sum(1).mean()
            total = total + weight * error / ctx.sae.normaliser.variance(m)
    return total / len(dense)


def loss(terms: Any, dense: dict[str, SAEOutput], ctx: LossContext) -> Tensor:
    """The sum of loss terms; those that decode by themselves by their formula."""
    total = 0.0
    for term in copy.deepcopy(list(terms)):
        by_hand = auxk if isinstance(term, AuxK) else nested_topk if isinstance(term, NestedTopK) else None
        total = total + (by_hand(term, dense, ctx) if by_hand else term(dense, ctx))
    return total
