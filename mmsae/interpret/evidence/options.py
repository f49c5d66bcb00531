"""Options of ``mmsae evidence``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Whereabouts:
    """Where the hosts of the evidence are, if they are no longer where it says."""

    host: str = ""
    """Name of the host that the SAE reads, as it is now; it must have the fingerprint that the evidence knows. Default:
    the name in evidence.json."""
    embedder: str = ""
    """The same of the host of the embeddings, where that is another (--embedder of mmsae evidence)."""


@dataclass(frozen=True)
class Evidencing:
    """What is kept as evidence of a latent."""

    n_top: int = 64
    """Items on which a latent is largest that are listed."""
    quantiles: int = 10
    """Into how many equal parts the items on which a latent fires are cut, by its value."""
    each: int = 4
    """Items drawn from each part, half of them of the train half and half of the test half."""
    negatives: int = 50
    """Items of each kind (random, hard) on which a latent is silent, half of either half."""
    min_items: int = 20
    """A latent that fires on fewer items, near-duplicates not counted, is not eligible: nothing is drawn for it."""
    copies: bool = False
    """Whether near-duplicates may be evidence; without, only the first of them is."""
    pixels: int = 160
    """Longer side of a thumbnail."""
    label: str = ""
    """Field of the samples' json that is the class name; empty: ``class``, or else the number in ``cls``."""
    embedder: str = ""
    """Host whose embeddings of all items are kept, and say which silent items are most like those on which a latent
    fires. Default: the host itself where it has embeddings; without any, pooled codes say it."""
    candidates: int = 8192
    """Items of each half, drawn at random, among which negatives are looked for."""
    text: str = "question"
    """What vision-language hosts read: ``question`` or ``question+answer``."""
    at_steps: int = 4
    """Denoising steps at which a denoiser is read, evenly spread over the schedule."""
    seed: int = 0
    """Seed of draws, and of the noise of images that are drawn."""
    keep_gb: float = 4.0
    """Disk for the codes of all rows: below it shards go through the host once, above it twice."""
