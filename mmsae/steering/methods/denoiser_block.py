"""Steering blocks of a denoiser: the recipe for SDXL and SDXL Turbo (arXiv 2410.22366) as interventions.

Sites are updates of attention blocks (``unet.up_blocks.0.attentions.1:update``), in multiples of a latent's mean when
active. Masks have any size; they are average-pooled to the block's grid.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mmsae.hosts.sites import Where
from mmsae.sae import SAE
from mmsae.steering.edits.codes import linear
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
        stats: Of their codes.
        mask: ``(H, W)`` or ``(B, H, W)`` weights in [0, 1]; None: everywhere.
        beta: Multiples of the mean when active. Negative ones push along the negative atom, also where the latent is
            off, as published; they are written without codes (``direction``), which is the same for unit-norm
            dictionaries without a normaliser.
        guided: Add on the conditional branch and subtract on the other: guidance doubles the effect. Else all branches
            get the same.
        steps: Half-open window.
        **gates: Others of the intervention.
    """
    push = {"writeback": "direction"} if torch.as_tensor(beta).min() < 0 else {}
    gates = {"branch": "sign" if guided else "all", **push, **gates}
    return Intervention(Edit.add(ids, beta), unit="x_mean_active", stats=stats, space=mask, steps=steps, **gates)


def transport(
    source: Sequence[int],
    target: Sequence[int],
    stats: FeatureStats,
    mask: Tensor | None = None,
    beta: float = 1.0,
    **gates: Any,
) -> Intervention:
    """Concept transport inside a mask: latents of one concept go out, those of another come in.

    Args:
        source: Latents that are ablated.
        target: Latents that are added, ``beta`` times their mean when active.
        stats: Of the codes.
        mask: Where.
        beta: Strength of what comes in.
        **gates: Of the intervention.
    """
    edit = Edit.ablate([i for i in source if i not in set(target)]) + Edit.add(target, beta)
    return Intervention(edit, unit="x_mean_active", stats=stats, space=mask, **{"branch": "all", **gates})


def icon(sae: SAE, feature: int, stats: FeatureStats, k: float = BETA, modality: str | None = None) -> Callable:
    """What a latent draws by itself: ``out' = in + k mean_active_i d_i`` everywhere, the block's own update dropped.

    For ``host.edit(SITE:update, icon(...), where=True)`` with an empty prompt.
    """
    m = sae._modality(modality)
    ids = torch.tensor([feature])
    one = float(stats.unit("x_mean_active", ids)[0])

    def fn(rows: Tensor, where: Where) -> Tensor:
        _, info = sae.normaliser(rows.to(sae.dictionary(m).weight.dtype), m)
        dz = rows.new_full((len(rows), 1), k * one)
        return linear(sae, m, dz, ids.to(rows.device), info).to(rows)

    return fn


def ablate_block(rows: Tensor) -> Tensor:
    """``out' = in``: for ``host.edit(SITE:update, ablate_block)``, the baseline of a block that does nothing."""
    return torch.zeros_like(rows)
