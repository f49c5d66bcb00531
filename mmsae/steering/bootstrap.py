"""Intervals by the bootstrap over prompts: the images of one prompt are not independent of each other."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

from mmsae.types import InputError

SAMPLES = 1000
LEVEL = 0.95


class Interval(NamedTuple):
    """A mean and where it lies.

    Attributes:
        mean: Over all values.
        low: Lower end; NaN with fewer than two prompts, for one prompt says nothing about others.
        high: Upper end.
        n: Values.
        prompts: Different prompts among them, which is what was resampled.
    """

    mean: float
    low: float
    high: float
    n: int
    prompts: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def interval(
    values: Sequence[float] | np.ndarray,
    prompts: Sequence[Hashable],
    samples: int = SAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> Interval:
    """Percentile interval of a mean, resampling prompts with all of their images.

    Args:
        values: ``(n,)``, one per image; NaN where a measure is undefined there, which is left out.
        prompts: ``(n,)``, which prompt each image came from.
        samples: Draws.
        level: Coverage.
        seed: Of the draws.

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
    draws = np.random.default_rng(seed).integers(0, number, (samples, number))
    means = total[draws].sum(1) / count[draws].sum(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(x.mean()), float(low), float(high), len(x), number)
