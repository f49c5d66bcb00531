"""Options of ``mmsae name``: how names are looked for, and when they hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Looking:
    """How names are looked for, on the train half of the evidence."""

    methods: tuple[str, ...] = ()
    """Any of vocabulary, centroid, wpmi, captions, lvlm, steering; default: those without a language model for which
    the evidence has what they need, and with a client lvlm."""
    vocabulary: str = "common"
    """Phrases for vocabulary, centroid and wpmi: common (1,700 phrases that ship with the package), imagenet21k,
    captions (phrases of the corpus's own captions), or a text file with one a line."""
    templates: str = "simple"
    """Prompt templates for the phrases: simple, openai, or a file with one a line, with {} for the phrase."""
    modality: Literal["auto", "image", "text"] = "auto"
    """By whose evidence latents are named; auto: images, and texts for latents that have evidence there alone."""
    hubs: Literal["csls", "z", "none"] = "csls"
    """What keeps phrases that score high for every latent from winning: csls, z (the score among those of the same
    phrase over all latents), none."""
    candidates: int = 5
    """Phrases of each method that are tried on the train half; the one that tells items apart best is kept."""
    longest: int = 3
    """Words of a phrase from captions, at most."""
    question: str = ""
    """What the steered host is asked of an image (method steering), for hosts that know few questions; default: what it
    sees, and what its strongest images have in common, in a word or a few."""
    top: int = 100
    """Strongest items that wpmi looks at."""
    latents: tuple[int, ...] = ()
    """Only these latents; default all that have evidence."""
    seed: int = 0
    """Seed of what is drawn: captions where there are over 200,000, latents that a client is asked about."""


@dataclass(frozen=True)
class Holding:
    """When a name holds, on the test half; latents whose best name does not are listed without one."""

    false_names: float = 0.15
    """With ``--control``: share of its latents, of random weights, that may get a name, by which the least AUROC is
    set."""
    min_auroc: float = 0.81
    """Without: least AUROC with which the name tells unseen items on which the latent fires, each counted by its value,
    from others. What random weights reach depends on the host, the data and the judge."""
    min_z: float = 3.0
    """Least z-score among the scores of the same phrase over all latents, for methods that have one."""
    min_items: int = 5
    """Least number of unseen items on which the latent fires."""
    judge: Literal["auto", "vectors", "words"] = "auto"
    """What the AUROC is of: vectors (cosine of an item's embedding and the name's), words (whether the caption has the
    name); auto: for each name the one by which it does better on the train half, but words alone where the embeddings
    are of the SAE's own host and there are captions."""
