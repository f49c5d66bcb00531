"""Did it work? Figures of a steered generation beside an unsteered one of the same noise, prompts and schedule.

Nothing here knows how an image was steered. Scorers of images are in ``scorers.py``; these are the statistics.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmsae.metrics.statistics import spearman
from mmsae.types import InputError


def directional(before: Tensor, after: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """``(B,)`` ``cos(E(I') - E(I), E(t+) - E(t0))``: whether images moved as the words did (StyleGAN-NADA's measure).

    ``before`` and ``after`` are ``(B, d)`` embeddings of unsteered and steered images, ``source`` of the text that
    describes them now and ``target`` of the one that should, ``(d,)`` or ``(B, d)``. 0 where the image did not move: no
    direction is no success.
    """
    return F.cosine_similarity(after - before, (target - source).expand_as(after), dim=-1)


class Locality(NamedTuple):
    """Where images changed."""

    inside: Tensor  #: ``(B,)`` mean squared change of the pixels in the mask.
    outside: Tensor  #: ``(B,)`` of the others.
    #: ``(B,)`` inside / (inside + outside), .5 for a change that knows no mask; NaN where nothing changed.
    share: Tensor


def locality(before: Tensor, after: Tensor, mask: Tensor) -> Locality:
    """How much of a change of images ``(B, C, H, W)`` lies inside a mask.

    The mask ``(h, w)`` or ``(B, h, w)``, true (or > .5) inside, is enlarged to the image by repeating its cells.

    Raises:
        InputError: A mask without inside or without outside.
    """
    m = mask if mask.dim() == 3 else mask[None]
    m = F.interpolate(m[:, None].to(before), before.shape[-2:], mode="nearest")[:, 0] > 0.5
    m = m.expand(len(before), -1, -1)
    inside = m.flatten(1).sum(1)
    if not ((inside > 0) & (inside < m[0].numel())).all():
        raise InputError("a mask that holds all pixels, or none, has no inside and outside to compare.")
    change = (after - before).square().mean(1)
    within = (change * m).flatten(1).sum(1) / inside
    without = (change * ~m).flatten(1).sum(1) / (m[0].numel() - inside)
    return Locality(within, without, within / (within + without))


class Dose(NamedTuple):
    """Dose response."""

    rho: float  #: Spearman of strength and mean score.
    rho_images: float  #: Spearman of strength and score over single images.
    means: dict[float, float]  #: Mean score by strength, ascending.


def dose_response(strengths: Sequence[float] | Tensor, scores: Sequence[float] | Tensor) -> Dose:
    """Whether more strength gives more effect, by strength ``(n,)`` and score ``(n,)`` of each image."""
    s, y = (torch.as_tensor(v, dtype=torch.float64) for v in (strengths, scores))
    levels, which = s.unique(return_inverse=True)
    means = torch.zeros_like(levels).index_add_(0, which, y) / torch.bincount(which)
    rho, rho_images = spearman(levels, means).item(), spearman(s, y).item()
    return Dose(rho, rho_images, dict(zip(levels.tolist(), means.tolist(), strict=True)))


class Specificity(NamedTuple):
    """An effect beside those of random live features at the same relative norm."""

    effect: float  #: Mean over images.
    control: float  #: Mean over controls and images.
    size: float  #: ``(effect - control) / standard deviation of the controls' means``.
    win_rate: float  #: Share of (control, image) pairs in which the feature does better, ties half.
    beaten: float  #: Share of controls whose mean lies below the feature's, ties half.
    controls: int


def specificity(effect: Tensor | Sequence[float], controls: Tensor | Sequence[Sequence[float]]) -> Specificity:
    """Compare a feature's scores ``(n,)`` with those ``(R, n)`` under controls on the same images, in the same order.

    Raises:
        InputError: Fewer than two controls, or other images.
    """
    e, c = torch.as_tensor(effect, dtype=torch.float64), torch.as_tensor(controls, dtype=torch.float64)
    if c.dim() != 2 or len(c) < 2 or c.shape[1] != len(e):
        raise InputError(
            f"specificity compares (n,) effects with (R >= 2, n) controls, not {tuple(e.shape)} with {tuple(c.shape)}."
        )
    means = c.mean(1)
    spread = means.std()
    difference = e.mean() - means.mean()
    size = difference / spread if spread > 0 else difference.sign() * torch.inf if difference else torch.zeros(())
    return Specificity(e.mean().item(), means.mean().item(), float(size), _wins(e, c), _wins(e.mean(), means), len(c))


def _wins(a: Tensor, b: Tensor) -> float:
    return ((a > b).double() + (a == b).double() / 2).mean().item()


def kid(x: Tensor, y: Tensor) -> float:
    """Kernel distance of ``x (n, d)`` and ``y (m, d)``: unbiased squared MMD of ``(x.y / d + 1)^3`` (1801.01401).

    Near 0 (it may be negative) where both come from one distribution.
    """
    x, y = x.double(), y.double()

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def off_diagonal(a: Tensor) -> Tensor:
        k, n = kernel(a, a), len(a)
        return (k.sum() - k.diagonal().sum()) / (n * (n - 1))

    return (off_diagonal(x) + off_diagonal(y) - 2 * kernel(x, y).mean()).item()


class Unlearning(NamedTuple):
    """How well a concept was forgotten, and what was kept (UnlearnCanvas, 2402.11846)."""

    ua: float  #: 1 - accuracy on prompts with the concept.
    ira: float  #: Accuracy on the other concepts of its domain.
    cra: float  #: Accuracy in other domains; NaN where there are none.
    objective: float  #: ``(UA + IRA) / 2``, by which SAeUron chooses its settings.


def unlearning(
    right: Tensor, concept: Sequence[str], target: str, others: Mapping[str, Tensor] | None = None
) -> Unlearning:
    """UA, IRA and CRA.

    Args:
        right: ``(n,)`` bool: whether a classifier sees the prompt's concept of the domain in the image.
        concept: ``(n,)`` the prompt's concept of the domain.
        target: The concept to forget.
        others: ``{domain: (n,) bool}`` whether it sees the prompt's concept of another domain in the same images.

    Raises:
        InputError: No prompt with the concept, or none without.
    """
    hit = torch.tensor([c == target for c in concept])
    if not hit.any() or hit.all():
        raise InputError(
            f"unlearning {target!r} is measured on prompts with and without it, {int(hit.sum())} of {len(hit)} have it."
        )
    ok = right.double()
    ua, ira = 1 - ok[hit].mean().item(), ok[~hit].mean().item()
    cra = torch.stack([v.double().mean() for v in others.values()]).mean().item() if others else float("nan")
    return Unlearning(ua, ira, cra, (ua + ira) / 2)
