"""Options of ``mmsae attributes``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Discovering:
    """Which features are asked about, and against what."""

    features: tuple[int, ...] = ()
    """Latents to ask about. Default: ``n_features`` drawn among the live ones."""
    n_features: int = 24
    """Latents drawn where none are named."""
    rates: tuple[float, ...] = (0.005, 0.2)
    """Least and largest share of the prompts' tokens (or places) on which a drawn latent fires."""
    strength: float = 0.5
    """How far a feature moves every row, as a share of the row's length; the same for all, and for controls."""
    vocabulary: str = "common"
    """Words that a feature may set: common (1,700 phrases that ship with the package), imagenet21k, or a text file with
    one a line."""
    random: int = 20
    """Random live features whose gains are the scale that a word must stand out from."""
    directions: int = 20
    """Controls: random directions, asked about as features are; what is found of them is by chance."""
    threshold: float = 3.0
    """Standard scores that a word must exceed, among the words and among the random features."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the noise of the first prompt; prompt i has each plus 1000003 i."""
    shown: int = 4
    """Pairs of images on the page, of every feature."""
    seed: int = 0
    """Seed of what is drawn: features, controls, the order in which the choice sees two images."""


@dataclass(frozen=True)
class Acting:
    """Where a feature acts."""

    site: str | None = None
    """Where, as ``unet.mid_block.attentions.0:update``; default: where the SAE was trained."""
    branch: str = "cond"
    """Guidance branches: cond, uncond, all or sign (+ and -)."""
    tokens: str | None = None
    """Tokens of text sites: content, eos, pad or all; default content."""
