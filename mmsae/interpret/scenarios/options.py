"""Options of ``mmsae scenarios``."""

from __future__ import annotations

from dataclasses import dataclass

from mmsae.errors import InputError


@dataclass(frozen=True)
class Mining:
    """What counts as a situation."""

    modality: str = "image"
    """Whose codes are mined."""
    present: float = 0.5
    """A concept is present in an item where its value exceeds this percentile, from 0 to 1, of its values above 0."""
    order: int = 3
    """Concepts of a conjunction at most, 1 to 3."""
    support: int = 5
    """Items that a conjunction holds of at least."""
    support_share: float = 1e-4
    """The same as a share of all items; the larger number counts."""
    dense: float = 0.1
    """Concepts that are present in a larger share of the items are left out of mining; queries may have them."""
    unnamed: bool = False
    """Whether latents without a name are mined, too."""
    auroc: float = 0.0
    """Names whose measured AUROC is lower are left out of mining."""
    fdr: float = 0.05
    """Largest expected share of false discoveries (Benjamini-Hochberg)."""
    lift: float = 2.0
    """A failure slice fails so many times as often as all items at least."""
    most: int = 50
    """Entries of each list."""

    def check(self) -> None:
        """Refuse values that have no meaning.

        Raises:
            InputError: Names the first.
        """
        if self.order not in (1, 2, 3):
            raise InputError(f"order is {self.order}; conjunctions are of 1, 2 or 3 concepts")
        for name in ("present", "dense", "fdr"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise InputError(f"{name} is {value}; it must lie between 0 and 1")


@dataclass(frozen=True)
class SuiteOptions:
    """Test suite of the situations that were found."""

    suite: int = 0
    """Items of each situation that are written as shards, the most different ones, and as many controls that lack one
    concept; 0 writes no suite."""
    shards: tuple[str, ...] = ()
    """Shards that the evidence is of, which the samples of a suite are taken from."""
    exclude: str = ""
    """File of uids, one a line, that the suite must not hold, such as those that a model was trained on."""
    pair_field: str = ""
    """Field of the samples' json that minimal pairs share (``pair`` in the generated world): an item's partner is its
    control where it lacks the concept."""
    seed: int = 0
    """Seed of what is drawn, and of the failures that are dealt to other items."""
