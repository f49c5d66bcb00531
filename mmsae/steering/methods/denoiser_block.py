"""Steering blocks of a denoiser: the recipe for SDXL and SDXL Turbo (arXiv 2410.22366) as interventions.

Sites are updates of attention blocks (``unet.up_blocks.0.attentions.1:update``), in multiples of a latent's mean when
active. Masks have any size; they are average-pooled to the block's grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmsae.steering.edits.edit import Edit
from mmsae.steering.edits.intervention import Intervention
from mmsae.steering.edits.units import FeatureStats

BETA = 10.0  # published; the interface of the paper goes to +-40


def paint(
    ids: int | Sequence[int],
    stats: FeatureStats,
    mask: Tensor | None = None,
    beta: float | Sequence[float] = BETA,
    *,
    guided: bool = False,
    steps: tuple[int, int] | range | None = None,
    **gates: Any,
) -> Intervention:
    """``out' = out + J(beta * mean_active_i * mask)``: a latent is added where a mask says, active there or not.

    Args:
        ids: Latents.
        stats: Statistics of their codes.
        mask: ``(H, W)`` or ``(B, H, W)`` weights in [0, 1]; None: everywhere.
        beta: Multiples of the mean when active. Negative ones push along the negative atom, also where the latent is
            off, as published; they are written without codes (``direction``), which is the same for unit-norm
            dictionaries without a normaliser.
        guided: Add on the conditional branch and subtract on the other: guidance doubles the effect. Else all branches
            get the same.
        steps: Half-open window.
        **gates: Other fields of the intervention.
    """
    push = {"writeback": "direction"} if torch.as_tensor(beta).min() < 0 else {}
    gates = {"branch": "sign" if guided else "all", **push, **gates}
    return Intervention(Edit.add(ids, beta), unit="x_mean_active", stats=stats, space=mask, steps=steps, **gates)
