"""Least squares of one stream on another, and what it explains on other rows; sums in float64, whatever the batches."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mmsae.metrics.components import Moments, axes_of
from mmsae.types import InputError

ROWS_PER_DIMENSION = 20  # fewer fit noise: 60 rows of width 48 give R^2 .87 on themselves and -3.75 on others


class Affine(NamedTuple):
    """A fitted map ``a -> (a - a_mean) weight + b_mean``, float64."""

    weight: Tensor  #: ``(p, q)``
    a_mean: Tensor  #: ``(p,)``
    b_mean: Tensor  #: ``(q,)``

    def __call__(self, a: Tensor) -> Tensor:
        """``(N, q)`` predictions from ``(N, p)``."""
        return (a.double() - self.a_mean) @ self.weight + self.b_mean


class Regression:
    """Least squares of ``(N, q)`` targets on ``(N, p)`` regressors, with an intercept; float64 sums of a stream."""

    def __init__(self) -> None:
        self.a, self.cross, self.total, self.square = Moments(), 0.0, 0.0, 0.0

    def add(self, a: Tensor, b: Tensor) -> None:
        """Add rows."""
        self.a.add(a)
        a, b = a.double(), b.double()
        self.cross = self.cross + a.T @ b
        self.total, self.square = self.total + b.sum(0), self.square + b.square().sum(0)

    def covariances(self) -> tuple[Tensor, Tensor, Tensor]:
        """``(p, p)`` of the regressors, ``(p, q)`` of both, and ``(q,)`` variances of the targets."""
        mean, own = self.a.of()
        freedom = max(1, self.a.n - 1)
        b_mean = self.total / self.a.n
        both = (self.cross - self.a.n * mean[:, None] * b_mean) / freedom
        return own, both, (self.square - self.a.n * b_mean.square()) / freedom

    def fit(self) -> Affine:
        """The least-squares map; directions with less than 1e-12 of the largest variance are rounding and left out.

        Raises:
            InputError: Fewer rows than 20 for each regressor.
        """
        mean, _ = self.a.of() if self.a.n else (torch.zeros(0), None)
        if self.a.n < ROWS_PER_DIMENSION * max(1, len(mean)):
            needed = ROWS_PER_DIMENSION * max(1, len(mean))
            raise InputError(
                f"a linear map of width {len(mean)} needs at least {needed:,} rows ({ROWS_PER_DIMENSION} for each "
                f"dimension) to be fitted on, not {self.a.n:,}: on fewer it fits noise"
            )
        own, both, _ = self.covariances()
        value, axes = axes_of(own)
        inverse = torch.where(value > 1e-12 * value[0].clamp(min=1e-300), 1 / value, 0.0)
        return Affine(axes @ (inverse[:, None] * (axes.T @ both)), mean, self.total / self.a.n)


class Spread:
    """Sums of squares of a stream's columns: about 0, and about the mean."""

    def __init__(self) -> None:
        self.n, self.total, self.square = 0, 0.0, 0.0

    def add(self, b: Tensor) -> None:
        """Add rows ``(N, q)``."""
        b = b.double()
        self.n, self.total, self.square = self.n + len(b), self.total + b.sum(0), self.square + b.square().sum(0)

    def about_mean(self) -> Tensor:
        """``(q,)``."""
        return (self.square - self.total.square() / max(1, self.n)).clamp(min=0)


def r2(residual: Spread, target: Spread) -> float:
    """Pooled R^2 over columns: 1 minus the residuals' sum of squares over the targets' about their mean."""
    total = float(target.about_mean().sum())
    return 1 - float(residual.square.sum()) / total if total > 0 else float("nan")
