"""Rank statistics with ties done right, and intervals: average ranks, AUROC, Spearman, Wilson, bootstraps."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmsae.types import InputError


def average_ranks(x: Tensor) -> Tensor:
    """``(N, L)`` float64 ranks 1..N within each column of ``x (N, L)``; equal values share the mean of their ranks."""
    v, order = x.T.contiguous().sort(1)  # sorting along the last dimension is ten times faster
    n = len(x)
    i = torch.arange(n, device=x.device).expand_as(v)
    change = v[:, 1:] != v[:, :-1]
    edge = torch.ones(len(v), 1, dtype=torch.bool, device=x.device)
    first = torch.where(torch.cat([edge, change], 1), i, 0).cummax(1).values
    last = torch.where(torch.cat([change, edge], 1), i, n - 1).flip(1).cummin(1).values.flip(1)
    ranks = (first + last).double() / 2 + 1
    return torch.empty_like(ranks).scatter_(1, order, ranks).T


def centred_ranks(x: Tensor) -> Tensor:
    """Average ranks within each column of ``x (N,)`` or ``(N, L)``, less their mean; float64."""
    ranks = average_ranks(x.reshape(len(x), -1))
    return (ranks - ranks.mean(0)).reshape(x.shape)


def spearman(x: Tensor, y: Tensor) -> Tensor:
    """Rank correlation of every column of ``x (N, A)`` with every column of ``y (N, B)``; ``(N,)`` is one column.

    ``(A, B)`` float64, without the dimension that a side has not; NaN where a column is constant.
    """
    a, b = (centred_ranks(v).reshape(len(v), -1) for v in (x, y))
    return (a.T @ b / (a.norm(dim=0)[:, None] * b.norm(dim=0))).reshape(x.shape[1:] + y.shape[1:])


def auroc_table(scores: Tensor, truth: Tensor) -> Tensor:
    """``(C, L)`` AUROC of every column of ``scores (N, L)`` against every one of ``truth (N, C)``, by one sort.

    Ties are counted half; NaN where a truth column has one class only.
    """
    t = truth.T.double()
    pos = t.sum(1, keepdim=True)
    wins = t @ average_ranks(scores) - pos * (pos + 1) / 2
    return wins / (pos * (len(truth) - pos))


def auroc_columns(scores: Tensor, truth: Tensor) -> Tensor:
    """``(C,)`` AUROC of score column c against truth column c, both ``(N, C)``; NaN where there is one class only."""
    t = truth.double()
    pos = t.sum(0)
    wins = (t * average_ranks(scores)).sum(0) - pos * (pos + 1) / 2
    return wins / (pos * (len(truth) - pos))


def auroc(positive: Tensor, negative: Tensor) -> float:
    """Chance that a positive's score exceeds a negative's, ties counted half.

    Raises:
        ValueError: Empty or NaN scores, which have no rank.
    """
    scores = torch.cat([positive.detach(), negative.detach()])
    if not len(positive) or not len(negative) or scores.isnan().any():
        raise ValueError(f"AUROC needs finite scores on both sides, got {len(positive)} and {len(negative)} with NaNs "
                         f"in {int(scores.isnan().sum())}")  # fmt: skip
    truth = torch.zeros(len(scores), 1, dtype=torch.bool, device=scores.device)
    truth[: len(positive)] = True
    return auroc_columns(scores[:, None], truth).item()


def pessimistic_ranks(scores: Tensor, right: Tensor, tie: float = 1e-6) -> Tensor:
    """``(n,)`` number of wrong candidates that score at least as high as the best right one; 0 is best.

    Collapsed codes tie in blocks; counting ties against the truth keeps them from looking good. ``scores`` and
    ``right`` are ``(n, m)``, every row of ``right`` has a True; scores closer than ``tie`` are equal (matrix products
    of equal rows differ by rounding).
    """
    best = scores.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
    return ((scores >= best - tie) & ~right).sum(1)


def wilson_ends(hits: np.ndarray, n: float, z: float = 1.959964) -> tuple[np.ndarray, np.ndarray]:
    """95% intervals of shares ``hits / n`` by Wilson's score (E. B. Wilson, JASA 1927), n above 0.

    They lie in [0, 1] and hold the share to the bit: by rounding alone that of n of n would often end below 1.
    """
    p, s = hits / n, z * z / n
    centre, half = p + s / 2, z * np.sqrt(p * (1 - p) / n + s / (4 * n))
    return np.maximum(0.0, np.minimum(p, (centre - half) / (1 + s))), np.minimum(
        1.0, np.maximum(p, (centre + half) / (1 + s))
    )


def wilson(hits: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """The interval of one share, see :func:`wilson_ends`; ``(nan, nan)`` of nothing."""
    if not n:
        return math.nan, math.nan
    low, high = wilson_ends(np.float64(hits), n, z)
    return float(low), float(high)


DRAWS = 1000  # of a bootstrap


def _ends(drawn: np.ndarray, outside: float = 0.05) -> tuple[float, float]:
    """The interval that leaves out a share of the draws, half on either side; NaNs are left out."""
    low, high = np.nanquantile(drawn, (outside / 2, 1 - outside / 2))
    return float(low), float(high)


def bootstrap_ratio(top: Tensor, bottom: Tensor, draws: int = DRAWS, seed: int = 0) -> tuple[float, float]:
    """95% interval of ``sum(top) / sum(bottom)``, both ``(n,)``, samples drawn with replacement.

    Numbers of repeats are drawn from Poisson(1) independently, which differs from a bootstrap of fixed size by less
    than 1/n and costs a fraction.
    """
    both = torch.stack([top, bottom], 1).double().cpu().numpy()
    step = max(1, 2 * 10**7 // max(1, len(both)))  # draws at a time: 20 MB of weights
    parts = [_repeats(len(both), min(step, draws - lo), seed + lo) @ both for lo in range(0, draws, step)]
    t, b = np.concatenate(parts).T
    return _ends(t / np.where(b == 0, np.nan, b))


@lru_cache(maxsize=2)
def _repeats(n: int, draws: int, seed: int) -> np.ndarray:
    """``(draws, n)`` uint8; kept, since many figures are of the same samples."""
    return np.random.default_rng(seed).poisson(1.0, size=(draws, n)).astype(np.uint8)


def bootstrap_mean(values: Tensor, draws: int = DRAWS, seed: int = 0) -> tuple[float, float]:
    """95% interval of the mean of ``(n,)`` values; NaNs are left out; ``(nan, nan)`` of fewer than two."""
    values = values.double()
    values = values[~values.isnan()]
    if len(values) < 2:
        return float("nan"), float("nan")
    return bootstrap_ratio(values, torch.ones_like(values), draws, seed)


def whiskers(value: float, low: float, high: float) -> tuple[float, float]:
    """How far an interval goes below and above its value, as error bars are drawn.

    Never negative: rounding may put an end on the wrong side of the value, which matplotlib refuses. 0 for NaN.
    """
    return max(0.0, value - low), max(0.0, high - value)


def paired_interval(a: Tensor, b: Tensor, draws: int = DRAWS, seed: int = 0) -> tuple[float, float]:
    """95% interval of ``mean(a) - mean(b)`` over the same samples, hits ``(n,)`` bool."""
    d = (a.double() - b.double()).numpy()
    values, counts = np.unique(d, return_counts=True)  # -1, 0, 1: resampling samples is a multinomial draw
    drawn = np.random.default_rng(seed).multinomial(len(d), counts / len(d), size=draws) @ values / len(d)
    return _ends(drawn)


def balanced_interval(hit: Tensor, n: Tensor, seed: int = 0) -> tuple[float, float]:
    """95% interval of the mean over classes of ``hit / n``, images drawn anew within their class."""
    own = n > 0
    n, p = n[own].numpy(), (hit[own] / n[own]).numpy().clip(0, 1)
    return _ends((np.random.default_rng(seed).binomial(n, p, (DRAWS, len(n))) / n).mean(1))


class Interval(NamedTuple):
    """A mean and where it lies."""

    mean: float  #: Over all values
    low: float  #: Lower end; NaN with fewer than two prompts, for one prompt says nothing about others
    high: float  #: Upper end
    n: int  #: Values
    prompts: int  #: Different prompts among them, which is what was resampled

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def interval(
    values: Sequence[float] | np.ndarray,
    prompts: Sequence[Hashable],
    draws: int = DRAWS,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Percentile interval of a mean, resampling prompts with all of their images.

    Args:
        values: ``(n,)``, one per image; NaN where a measure is undefined there, which is left out.
        prompts: ``(n,)``, which prompt each image came from.
        draws: Number of bootstrap samples.
        level: Coverage.
        seed: Seed of the draws.

    Raises:
        InputError: Values and prompts of different number.
    """
    x, group = np.asarray(values, float), np.asarray(prompts)
    if len(x) != len(group):
        raise InputError(f"{len(x)} values were given with {len(group)} prompts: every value needs its prompt.")
    x, group = x[~np.isnan(x)], group[~np.isnan(x)]
    number, which = len(np.unique(group)), np.unique(group, return_inverse=True)[1]
    if not len(x):
        return Interval(np.nan, np.nan, np.nan, 0, 0)
    if number < 2:
        return Interval(float(x.mean()), np.nan, np.nan, len(x), number)
    total, count = np.bincount(which, x, number), np.bincount(which, minlength=number)
    drawn = np.random.default_rng(seed).integers(0, number, (draws, number))
    low, high = _ends(total[drawn].sum(1) / count[drawn].sum(1), 1 - level)
    return Interval(float(x.mean()), low, high, len(x), number)
