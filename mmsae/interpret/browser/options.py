"""Options of ``mmsae explore``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Display:
    """What the browser shows, which is what makes its size."""

    images: Literal["show", "blur", "none"] = "show"
    """``show`` images, ``blur`` them until they are pointed at, or leave them out (``none``)."""
    title: str = ""
    """Heading of the browser. Default: name of the folder that the evidence is in."""
    top: int = 12
    """Top items of a latent and modality."""
    each: int = 2
    """Examples from every quantile of a latent's values."""
    codes: int = 64
    """Latents kept of every item and modality, the ones that are largest beside their own maximum. Queries and sample
    pages see these."""
    maps: int = 16
    """Latents of every item, the strongest, of which its page shows where in it they fire and how many areas they make;
    of the others the examples on their own pages do."""
    map_megabytes: float = 150.0
    """About how many megabytes maps may take, those of examples and those of samples. Where they would take more,
    samples have maps of fewer latents, and if need be examples only of the places where a latent is strongest."""
    neighbours: int = 10
    """Nearest latents and samples that are listed."""
    layout: Literal["auto", "pca", "tsne", "umap", "none"] = "auto"
    """The map of latents. ``auto``: t-SNE up to 6,000 living latents, PCA above; ``umap`` needs umap-learn."""
    vocabulary: str = "common"
    """Phrases that latents are found by (``like dog``), read by the host of the embeddings: common, imagenet21k, or a
    file with one a line. ``captions``, or where the host reads no text: the words of captions, and no host is
    loaded."""
    features: bool = False
    """Write ``exports/features.jsonl``, too: every latent with its examples, in the keys of public dashboards
    (Neuronpedia's, SAEDashboard's)."""
    seed: int = 0
    """Seed of the map and of the samples that co-activation is counted on."""


@dataclass(frozen=True)
class Pages:
    """What else the browser has pages of."""

    tree: str = ""
    """Tree of the labels for the page of the ontology: ``wordnet``, or a file of node, parent and name with tabs."""
    strips: tuple[str, ...] = ()
    """Folders of ``mmsae steer``: what features draw at each strength, on the pages of these latents."""
    attributes: str = ""
    """What ``mmsae attributes`` wrote, its folder or the JSON in it: words that features set in images."""
