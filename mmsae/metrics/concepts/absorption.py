"""Feature absorption and targeted probe perturbation (SAEBench, arXiv 2503.09532).

All in the units in which codes are decoded by the atoms alone: normalised activations minus the dictionary's bias.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mmsae.metrics.concepts.probing import class_means, logistic, matrix, most_different, predictions
from mmsae.metrics.sparsity import summed
from mmsae.types import Codes

ABSORBERS, NEAR, SHARE = 3, 0.1, 0.4  # absorbers looked at, their least cosine and least share of the projection
FULL = 0.025  # least cosine of the feature that replaces silent main ones


class Absorbed(NamedTuple):
    """What :func:`absorption` finds on the rows of a concept."""

    fraction: Tensor  #: ``(N,)`` float64 share of the concept that other features carry in place of the main ones
    full: Tensor  #: ``(N,)`` bool: the main features are silent and one other feature carries the concept


def f1(said: Tensor, truth: Tensor) -> float:
    """F1 of bool predictions."""
    both = (said & truth).sum().item()
    return 2 * both / max(1, int(said.sum()) + int(truth.sum()))


def main_features(codes: Codes, truth: Tensor, gain: float = 0.03, most: int = 10, l2: float = 1.0) -> Tensor:
    """``(k,)`` features of a concept's k-sparse probe, k grown up to ``most`` while its F1 gains more than ``gain``.

    Only features that are larger with the concept than without count: SAEBench takes the largest absolute differences,
    among which may be one that another concept has and this one never. ``l2`` is the penalty of the probe.
    """
    x, y = matrix(codes), truth.long().numpy()
    without, with_it = class_means(x, y, 2)[0]
    rises = with_it > without
    order = most_different(x, y, 2, x.shape[1])
    order = order[rises[order]][:most]
    kept, best = 0, -1.0
    for k in range(1, len(order) + 1):
        score = f1(predictions(logistic(x, y, 2, l2, order[:k]), x).bool(), truth)
        if score <= best + gain:
            break
        kept, best = k, score
    return torch.from_numpy(order[:kept].copy())


@torch.no_grad()
def absorption(x: Tensor, codes: Codes, atoms: Tensor, direction: Tensor, main: Tensor) -> Absorbed:
    """How far features of the concept's children have taken over from its main features.

    On rows where the concept's probe says yes, every feature contributes ``z_i cos(p, d_i)`` to the projection on the
    probe's direction p. Absorbers are the three other features with the largest contributions, of cosine .1 or more. A
    row counts 0 where they carry less than .4 of the projection or the main features all of it, 1 where the main ones
    carry nothing, else the absorbers' share. ``x (N, d)`` and ``codes`` are the rows on which the probe is positive,
    ``atoms`` are ``(F, d)``, ``direction`` is ``(d,)`` and ``main`` the ``(k,)`` main features.
    """
    p = normalize(direction.double(), dim=0)
    cos = normalize(atoms.double(), dim=1) @ p
    ids, values = codes.ids(), codes.values.double()
    is_main = torch.zeros_like(cos, dtype=torch.bool).index_fill_(0, main, True)[ids]
    contribution = values * cos[ids]  # of the latents that were selected; the others' is 0
    mains = (contribution * is_main).sum(1)
    others = contribution.masked_fill(is_main, 0)
    near = others.masked_fill(cos[ids] < NEAR, 0).clamp(min=0)
    absorbers = near.topk(min(ABSORBERS, near.shape[1]), dim=1).values.sum(1)
    projection = x.double() @ p
    rest = torch.minimum(absorbers, projection - mains)
    fraction = torch.where(mains <= 0, 1.0, rest / (rest + mains))
    none = (absorbers < SHARE * projection) | (mains >= projection) | (projection <= 0)
    fraction = torch.where(none, 0.0, fraction)
    best, which = others.max(1)
    silent = ~(is_main & (values != 0)).any(1)
    points = cos[ids.gather(1, which[:, None])[:, 0]] >= FULL
    full = silent & points & (best >= SHARE * projection) & (projection > 0)
    return Absorbed(fraction, full)


def effects(codes: Codes, truth: Tensor, atoms: Tensor, direction: Tensor) -> Tensor:
    """``(F,)`` float64 effect of each feature on a probe: difference of its class means times its atom's projection."""
    with_it, without = (summed(part, part.values.double()) / part.n for part in map(codes.rows, (truth, ~truth)))
    return (with_it - without) * (atoms.double() @ direction.double())


class Binary(NamedTuple):
    """A linear probe that says yes above 0."""

    weight: Tensor  #: ``(d,)``
    bias: float  #: Scalar

    def right(self, x: Tensor, truth: Tensor) -> Tensor:
        """``(N,)`` bool: the rows that it gets right."""
        return (x.double() @ self.weight + self.bias > 0) == truth


def fit_binary(x: Tensor, truth: Tensor, l2: float = 1.0) -> Binary:
    """Logistic regression of one concept."""
    probe = logistic(matrix(x), truth.long().numpy(), 2, l2)
    weight = torch.from_numpy(probe.weight[:, 1] - probe.weight[:, 0])
    return Binary(weight, float(probe.bias[1] - probe.bias[0]))


@torch.no_grad()
def tpp(
    x: Tensor, codes: Codes, atoms: Tensor, truth: Tensor, probes: Sequence[Binary], chosen: Sequence[Tensor], n: int
) -> float:
    """Targeted probe perturbation: how much ablating a concept's n features hurts its probe more than the others'.

    What the SAE misses of a row stays when features are ablated. Ablated rows are not made: a probe is linear, so it
    loses a feature's value times the projection of its atom.

    Args:
        x: ``(N, d)``.
        codes: Their codes.
        atoms: ``(F, d)``.
        truth: ``(N, C)`` bool.
        probes: One per concept, fitted on other rows.
        chosen: Per concept its features by falling effect; those of no positive effect are left out.
        n: Features ablated.
    """
    weight = torch.stack([p.weight for p in probes], 1)  # (d, C)
    logits = x.double() @ weight + torch.tensor([p.bias for p in probes], dtype=torch.float64)
    accuracy = lambda said: ((said > 0) == truth).double().mean(0)  # noqa: E731
    drops = []
    for features in (ids[:n] for ids in chosen):
        lost = codes.gather(features).double() @ (atoms[features].double() @ weight)
        drops.append(accuracy(logits) - accuracy(logits - lost))
    drop = torch.stack(drops)  # (ablated concept, probe)
    own, c = drop.diagonal(), len(probes)
    others = (drop.sum(1) - own) / max(1, c - 1)
    return (own - others).mean().item()
