"""What scorers return: a value per latent with its chance level, number of outcomes and interval; AUROC in batches."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

Z = 1.959964  # of intervals of 95 %
PAIRS = 2**25  # comparisons at a time


class Scores(NamedTuple):
    """One scorer's values of L latents; NaN where a latent could not be scored."""

    latents: np.ndarray  #: ``(L,)``
    value: np.ndarray  #: ``(L,)``
    chance: float | np.ndarray  #: What a scorer that knows nothing gets, of all latents or of each ``(L,)``
    n: np.ndarray  #: ``(L,)`` outcomes that a value rests on
    low: np.ndarray  #: ``(L,)`` lower end of its 95 % interval
    high: np.ndarray  #: ``(L,)`` upper end

    def of(self, latents: np.ndarray) -> Scores:
        """The rows of some of the latents, in their order."""
        at = {j: i for i, j in enumerate(self.latents.tolist())}
        rows = np.array([at[j] for j in latents.tolist()], np.int64)
        return Scores(*(v[rows] if isinstance(v, np.ndarray) else v for v in self))


def auroc_rows(positive: np.ndarray, negative: np.ndarray, weight: np.ndarray | None = None) -> np.ndarray:
    """``(L,)`` chance that a positive ``(L, P)`` exceeds a negative ``(L, N)`` of its row, ties counted half.

    NaN entries are not there; rows without any on one side are NaN. ``weight (L, P)``: how much a positive counts, 1
    without.
    """
    out, step = np.full(len(positive), np.nan), max(1, PAIRS // max(1, positive.shape[1] * negative.shape[1]))
    counts = ~np.isnan(positive) * (np.ones(positive.shape) if weight is None else weight)
    pairs = counts.sum(1) * (~np.isnan(negative)).sum(1)
    for lo in range(0, len(positive), step):
        p, n = positive[lo : lo + step, :, None], negative[lo : lo + step, None]
        wins = (p > n).sum(2) + 0.5 * (p == n).sum(2)  # comparisons with NaN are false
        out[lo : lo + step] = (wins * counts[lo : lo + step]).sum(1)
    return np.where(pairs > 0, out / np.where(pairs > 0, pairs, 1), np.nan)


def auroc_interval(value: np.ndarray, n_pos: np.ndarray, n_neg: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """95 % interval of AUROC by the standard error of J. A. Hanley and B. J. McNeil (Radiology 1982), cut to [0, 1].

    At 0 and 1, where that error is 0, the end is where none of ``min(n_pos, n_neg)`` is expected to differ (rule of
    three: ``3 / n``).
    """
    a, n_pos, n_neg = value, np.maximum(n_pos, 1), np.maximum(n_neg, 1)
    q1, q2 = a / (2 - a), 2 * a**2 / (1 + a)
    var = (a * (1 - a) + (n_pos - 1) * (q1 - a**2) + (n_neg - 1) * (q2 - a**2)) / (n_pos * n_neg)
    half = Z * np.sqrt(np.maximum(var, 0))
    rule = np.minimum(1, 3 / np.minimum(n_pos, n_neg))
    half = np.where((a <= 0) | (a >= 1), rule, half)
    return np.clip(a - half, 0, 1), np.clip(a + half, 0, 1)


def wilson_rows(hits: np.ndarray, n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``mmsae.metrics.statistics.wilson`` of many shares at once; NaN where ``n`` is 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        p, s = hits / n, Z * Z / n
        centre, half = p + s / 2, Z * np.sqrt(p * (1 - p) / n + s / (4 * n))
        return np.clip(np.minimum(p, (centre - half) / (1 + s)), 0, 1), np.clip(
            np.maximum(p, (centre + half) / (1 + s)), 0, 1
        )


def auroc_scores(latents: np.ndarray, positive: np.ndarray, negative: np.ndarray) -> Scores:
    """AUROC of values of positives ``(L, P)`` against negatives ``(L, N)``, NaN for none."""
    n_pos, n_neg = (~np.isnan(positive)).sum(1), (~np.isnan(negative)).sum(1)
    value = auroc_rows(positive, negative)
    return Scores(latents, value, 0.5, n_pos + n_neg, *auroc_interval(value, n_pos, n_neg))


def accuracy_scores(latents: np.ndarray, hits: np.ndarray, n: np.ndarray, chance: float | np.ndarray) -> Scores:
    """Shares of ``n (L,)`` outcomes that were right, with Wilson's interval."""
    with np.errstate(invalid="ignore", divide="ignore"):
        value = np.where(n > 0, hits / n, np.nan)
    return Scores(latents, value, chance, n, *wilson_rows(hits, n))
