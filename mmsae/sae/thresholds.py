"""The thresholds of pre-codes by which an SAE selects after its training, whichever selector learned them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmsae.sae.variants.batch_topk import Thresholded
from mmsae.sae.variants.jumprelu import JumpReLU
from mmsae.types import InputError


@torch.no_grad()
def thresholds(sae: Any, modality: str) -> Tensor:
    """``(d_sae,)`` theta such that the code of a row is its pre-codes above theta; infinite for what never fires.

    Raises:
        InputError: A selector without thresholds, or one that compares absolute values, or has not been trained.
    """
    selector, score = sae.selector, getattr(sae.selector, "score_name", "value")
    if isinstance(selector, JumpReLU):
        return selector.threshold(modality).detach()
    if not isinstance(selector, Thresholded) or score not in ("value", "norm"):
        raise InputError(
            f"selector {selector.name!r} with score {score!r} has no thresholds of pre-codes that jumprelu could take"
        )
    theta = selector.threshold(modality).to(sae.dictionary(modality).like).expand(sae.d_sae)
    if score == "value":
        return theta
    norms = sae.dictionary(modality).rows().norm(dim=1)  # an atom of norm 0 has score 0, which no threshold is below
    return torch.where(norms > 0, _largest_below(theta, torch.where(norms > 0, norms, 1.0)), torch.inf)


def _largest_below(threshold: Tensor, norms: Tensor) -> Tensor:
    """``(d_sae,)`` theta such that ``u > theta`` is what ``u * norms > threshold`` is, for floating-point u too."""
    up, theta = torch.full_like(norms, torch.inf), threshold / norms
    for _ in range(3):  # a quotient is off by a step or two
        theta = torch.where(theta * norms > threshold, torch.nextafter(theta, -up), theta)
    for _ in range(3):
        above = torch.nextafter(theta, up)
        theta = torch.where(torch.isfinite(theta) & (above * norms <= threshold), above, theta)
    return theta
