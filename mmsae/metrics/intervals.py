"""Bootstrap intervals over samples: of means, of ratios of sums, and of differences over the same samples."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

DRAWS = 1000


def bootstrap_ratio(top: Tensor, bottom: Tensor, draws: int = DRAWS, seed: int = 0) -> tuple[float, float]:
    """95% interval of ``sum(top) / sum(bottom)``, both ``(n,)``, samples drawn with replacement.

    Numbers of repeats are drawn from Poisson(1) independently, which differs from a bootstrap of fixed size by less
    than 1/n and costs a fraction.
    """
    both = torch.stack([top, bottom], 1).double().cpu().numpy()
    step = max(1, 2 * 10**7 // max(1, len(both)))  # draws at a time: 20 MB of weights
    parts = [_repeats(len(both), min(step, draws - lo), seed + lo) @ both for lo in range(0, draws, step)]
    t, b = np.concatenate(parts).T
    low, high = np.nanquantile(t / np.where(b == 0, np.nan, b), (0.025, 0.975))
    return float(low), float(high)


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
    low, high = np.quantile(drawn, (0.025, 0.975))
    return float(low), float(high)
