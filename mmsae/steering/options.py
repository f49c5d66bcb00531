"""Options of ``mmsae steer``: how to steer, where it acts, what is compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Edits:
    """How to steer: one of features, edit, concept, words and forget."""

    features: tuple[int, ...] = ()
    """Latents to edit."""
    op: str = "add"
    """What is done to them: add, set or scale, by the strength."""
    edit: tuple[dict[str, Any], ...] = ()
    """Instead of features: primitives of one edit, as ``{op: set, ids: [3], v: 1} {op: ablate, ids: [5]}``."""
    concept: str | None = None
    """Instead: a phrase, whose concept vector is added, strength times (negative removes)."""
    words: tuple[str, ...] = ()
    """Instead: two words; the second takes the place of the first in the text encoder's codes."""
    forget: str | None = None
    """Instead: a concept that the denoiser shall not draw any more; strengths are then the negative factors."""
    anchors: Any = None
    """Prompts that choose features, which should be others than ``prompts``: for words a text file, for forget a YAML
    file of {concept: [prompts]}."""
    top: int = 16
    """Features exchanged for words."""
    percentile: float = 99.995
    """Percentile of selection scores above which a latent is taken, for forget."""


@dataclass(frozen=True)
class Gates:
    """What a strength means, and where it acts."""

    unit: str = "x_mean_active"
    """Unit of strengths: raw, x_mean_active, x_mean_all, x_max, x_p99 (...), rel_norm."""
    writeback: str = "delta"
    """How the host's state is changed: delta, splice, direction or project_out."""
    policy: str = "post"
    """When the largest codes of top-k SAEs are selected: post, pre or budget."""
    site: str | None = None
    """Where, as ``unet.mid_block.attentions.0:update``; default: where the SAE was trained."""
    branch: str = "cond"
    """Guidance branches: cond, uncond, all or sign (+ and -)."""
    tokens: str | None = None
    """Tokens of text sites: content, eos, pad or all; default content."""
    window: tuple[int, ...] = ()
    """Steps at which to act, first and one after the last; default all."""
    active: float | None = None
    """Act only on tokens where a feature exceeds this raw code."""
    mask: str | None = None
    """Grey image, white where to act; then the share of the change inside is measured too."""
    stats: str | None = None
    """Folder of feature statistics; default: they are measured on the anchors, or the prompts."""


@dataclass(frozen=True)
class Sweep:
    """What is compared and measured."""

    strengths: tuple[float, ...] = (1.0, 2.0, 5.0)
    """Several values; none is 0, which is always drawn."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the noise of the first prompt, several values; prompt i, from 0, has each plus 1000003 i, so that no two
    prompts share their noise. The table has the sums."""
    controls: int = 20
    """Random live features to compare with, at every strength; 0 for none."""
    scorers: tuple[str, ...] = ()
    """Scores of images, ``NAME=MODULE:SCORER`` or ``NAME=MODULE:MAKE(ARGUMENTS)``: a scorer takes images
    ``(B, 3, H, W)`` in [0, 1] and their prompts and returns B numbers."""
    judge: str | None = None
    """open_clip host that measures how far images move towards ``target`` and what is kept of them."""
    target: str | None = None
    """Text that should become true; with words, the prompt with the second word."""
    shown: int = 6
    """Prompts in the grid of images, with the first seed."""
    names: str | None = None
    """``names.json`` of ``mmsae name``: what the features are called on the page."""
