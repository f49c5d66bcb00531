"""Options of ``mmsae analyse``; see :mod:`mmsae.options`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mmsae.errors import InputError


@dataclass(frozen=True)
class Analysing:
    """What all of them read."""

    names: str | None = None
    """File ``names.json`` with names of latents; default: EVIDENCE/names/names.json, where there is one."""
    modality: str = ""
    """Whose codes are read: ``image`` or ``text``. Default: ``image`` where the evidence has it."""
    above: float = 0.0
    """A concept is in an item where its value's percentile, among all items on which it fires, is above this: 0 is
    wherever it fires, .5 the stronger half."""
    min_items: int = 20
    """A latent that fires on fewer items is left out; for pairs of latents, items on which both fire."""
    shown: int = 24
    """Results with examples on the page; the tables have all."""
    seed: int = 0
    """Seed of everything that is drawn."""

    def __post_init__(self) -> None:
        if not 0 <= self.above < 1:
            raise InputError(f"above is {self.above}; percentiles lie between 0 and 1")


@dataclass(frozen=True)
class Splitting:
    """``diff``: how one corpus is split in two, A and B; two folders need none of these."""

    split: str = ""
    """A query over concepts, or a file ``query.json``: A is where it holds, B where it does not."""
    labels_a: tuple[str, ...] = ()
    """Classes of A."""
    labels_b: tuple[str, ...] = ()
    """Classes of B; default: all that are not in A."""
    uids: str = ""
    """File with the uids of A: one a line, or the ``uids.npy`` of ``mmsae filter``; B is all others."""


@dataclass(frozen=True)
class Differing:
    """``diff``: what counts as a difference."""

    paired: Literal["", "uid", "key"] = ""
    """Two folders hold the same items, known by this column, such as the pictures that two models drew of the same
    prompts: differences are then tested within items."""
    fdr: float = 0.05
    """Share of wrong calls that is tolerated among the differences found."""
    order: Literal["z", "difference", "relative"] = "z"
    """What comes first: the standardised difference, the difference of shares, or that as a share of the larger."""
    same: float = 0.8
    """Latents that fire on the same items to this share (Jaccard) are listed under the first of them."""
    copies: bool = False
    """Whether near-duplicates within a side all count; without, the first of them does."""


@dataclass(frozen=True)
class Correlating:
    """``correlate``: which pairs of concepts."""

    across: bool | None = None
    """Between what images show and what captions say, rather than within ``modality``. Default: where there are both
    and no ``modality`` is given."""
    similar: float = 0.3
    """A pair is surprising where the names are less alike than this (Dice coefficient of their letters in threes)."""
    pairs: int = 10_000
    """Pairs that are kept, those with the highest NPMI."""


@dataclass(frozen=True)
class Clustering:
    """``cluster``: items by some of their concepts."""

    concepts: tuple[str, ...] = ()
    """Which concepts items are compared by: names (``"red*"`` stands for all that begin so) and latents (``#12``).
    Default: all."""
    label: str = ""
    """Or: those that are ``lift`` times as frequent in this class as in all."""
    lift: float = 2.0
    """See ``label``."""
    clusters: int = 8
    """Number of clusters."""
    method: Literal["kmeans", "spectral", "agglomerative"] = "kmeans"
    """How items are grouped. ``kmeans`` takes distances of values alone (``l2``)."""
    metric: Literal["l2", "jaccard"] = "l2"
    """``l2``: distances of values, each latent's scaled to a largest of 1. ``jaccard``: share of concepts that two
    items do not have in common, whatever their strength."""
    items: int = 4000
    """``spectral`` and ``agglomerative`` compare all pairs of at most so many items, drawn at random; all others go to
    the nearest cluster."""


@dataclass(frozen=True)
class Retrieving:
    """``retrieve``: which items, and how well they are found where the truth is known."""

    queries: tuple[str, ...] = ()
    """Queries over concepts, such as ``"red & ~circle"``, or files ``query.json``."""
    k: int = 20
    """Items of a list: of the page, of P@k and of nDCG@k."""
    truth: str = ""
    """What says which items are right: ``label`` (the class), or a field of the samples' json, a text or a list of
    texts. A query is then read with these values in place of concepts."""
    truth_queries: tuple[str, ...] = ()
    """Queries over the truth, in the order of ``queries``, where they are worded otherwise."""
    shards: str | list[str] = ""
    """The shards of the evidence, for ``truth`` in a field of json."""
    host: str = ""
    """Host whose texts dense retrieval compares with the embeddings of the evidence; default: the one that made them;
    ``none``: no dense retrieval."""
    templates: tuple[str, ...] = ("a photo of {}",)
    """Texts around a phrase, for dense retrieval."""
    draws: int = 300
    """Samples of the intervals."""
