"""How well a ranking finds what is wanted: average precision, precision and discounted gain at k, and their intervals.

Scores of queries have many ties (all that is silent scores 0), so a tie counts as what it gives on average over its
orders, and never as the order in which items happen to lie.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mmsae.types import InputError


class RankingQuality(NamedTuple):
    """How good a ranking is, in [0, 1] each."""

    average_precision: float  #: Area under precision over recall, ties as one step
    precision: float  #: Share of the wanted among the first k
    ndcg: float  #: Discounted gain of the first k, as a share of the best possible


def ranking_quality(scores: np.ndarray, wanted: np.ndarray, k: int = 20) -> RankingQuality:
    """Quality of a ranking.

    Args:
        scores: ``(n,)``, the largest first.
        wanted: ``(n,) bool`` what should come first.
        k: Length of the list for ``precision`` and ``ndcg`` (Jarvelin and Kekalainen, TOIS 2002, gains of 0 and 1).

    Raises:
        InputError: Nothing is wanted, or scores and truth differ in number.
    """
    return RankingQuality(*_Ranked(scores, wanted, k).quality(None))


def ranking_draws(scores: np.ndarray, wanted: np.ndarray, k: int = 20, draws: int = 300, seed: int = 0) -> np.ndarray:
    """``(draws, 3)`` qualities of samples of the items with replacement; one seed draws the same items for any scores,
    so that differences of two rankings are differences of their draws.
    """
    ranked, rng = _Ranked(scores, wanted, k), np.random.default_rng(seed)
    return np.array([ranked.quality(rng.poisson(1.0, len(scores))) for _ in range(draws)])


def draws_interval(draws: np.ndarray) -> tuple[float, float]:
    """95% interval of ``(draws,)`` values of a bootstrap; samples in which nothing was wanted say nothing."""
    low, high = np.nanquantile(draws, (0.025, 0.975))
    return float(low), float(high)


class _Ranked:
    """Items in the order of their scores, with where ties begin."""

    def __init__(self, scores: np.ndarray, wanted: np.ndarray, k: int) -> None:
        scores, wanted = np.asarray(scores), np.asarray(wanted, bool)
        if scores.shape != wanted.shape:
            raise InputError(f"{len(scores)} scores were given with the truth of {len(wanted)} items")
        if not wanted.any():
            raise InputError(f"a ranking of {len(scores)} items of which none is wanted has no quality")
        if np.isnan(scores).any():
            raise InputError(f"{int(np.isnan(scores).sum())} of {len(scores)} scores are NaN, which has no rank")
        self.order = np.argsort(-scores, kind="stable")
        self.k, self.wanted = k, wanted[self.order]
        ranked = scores[self.order]
        self.start = np.flatnonzero(np.concatenate([[True], ranked[1:] != ranked[:-1]]))

    def quality(self, repeats: np.ndarray | None) -> tuple[float, float, float]:
        """With every item so many times; None: once."""
        many = np.ones(len(self.order), int) if repeats is None else repeats[self.order]
        hits, all_of = np.add.reduceat(many * self.wanted, self.start), np.add.reduceat(many, self.start)
        total = hits.sum()
        if not total:
            return np.nan, np.nan, np.nan
        found, seen = hits.cumsum(), all_of.cumsum()
        average = float((hits * found / np.maximum(seen, 1)).sum() / total)
        k = min(self.k, int(seen[-1]))
        ties = int(np.searchsorted(seen, k)) + 1  # that reach into the first k
        share = hits[:ties] / np.maximum(all_of[:ties], 1)
        first = np.repeat(share, np.minimum(all_of[:ties], k))[:k]  # what each place holds on average
        gain = 1 / np.log2(np.arange(k) + 2)
        return average, float(first.mean()), float((first * gain).sum() / gain[: min(k, int(total))].sum())
