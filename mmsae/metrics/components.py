"""Principal components in the place of an SAE: the strongest control of equal size."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mmsae.types import IMAGE, Codes

CHUNK = 8192  # rows at a time in float64


class Moments:
    """Mean and covariance of rows, summed in float64."""

    def __init__(self) -> None:
        self.n, self.total, self.square = 0, 0.0, 0.0

    def add(self, x: Tensor) -> None:
        """Add rows ``(N, d)``."""
        for part in x.split(CHUNK):
            part = part.double()
            self.n += len(part)
            self.total = self.total + part.sum(0)
            self.square = self.square + part.T @ part

    def of(self) -> tuple[Tensor, Tensor]:
        """``(d,)`` mean and ``(d, d)`` covariance, float64."""
        mean = self.total / self.n
        return mean, (self.square - self.n * mean[:, None] * mean) / max(1, self.n - 1)


def axes_of(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """``(d,)`` variances in falling order, and ``(d, d)`` the principal axes, as columns."""
    value, vector = torch.linalg.eigh(covariance)
    return value.flip(0), vector.flip(1)


def principal(x: Tensor | Moments, least: float = 1e-6) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, ``(d, r)`` principal axes in falling order, and ``(r,)`` standard deviations, in float64.

    Axes with less than ``least`` of the largest variance are left out: they are rounding. ``x`` is rows ``(N, d)``, or
    their moments.
    """
    if isinstance(x, Moments):
        mean, covariance = x.of()
    else:
        mean = x.double().mean(0)
        c = x.double() - mean
        covariance = c.T @ c / max(1, len(x) - 1)
    value, axes = axes_of(covariance)
    keep = value > least * value[0]
    return mean, axes[:, keep], value[keep].sqrt()


class Components(NamedTuple):
    """Principal components in the place of an SAE: all of them are on in every row."""

    mean: Tensor  #: ``(d,)`` float64
    axes: Tensor  #: ``(d, k)`` float64

    @classmethod
    def leading(cls, x: Tensor | Moments, l0: float) -> Components:
        """The leading components of some rows, as many as a code has latents on."""
        mean, axes, _ = principal(x)
        return cls(mean, axes[:, : max(1, round(l0))])

    def project(self, x: Tensor) -> Tensor:
        """``(N, k)`` float64 projections of rows ``(N, d)``."""
        return (x.double() - self.mean.to(x.device)) @ self.axes.to(x.device)

    def restore(self, z: Tensor) -> Tensor:
        """``(N, d)`` reconstructions from projections."""
        return (self.mean + z.double().cpu() @ self.axes.T).float()

    def encode(self, x: Tensor, modality: str = IMAGE) -> Codes:
        """Projections of rows ``(N, d)`` as codes."""
        z = self.project(x)
        return Codes(z.float(), None, z.shape[1], modality)

    def decode(self, z: Codes, modality: str = IMAGE) -> Tensor:
        """``(N, d)`` reconstructions."""
        return self.restore(z.values)
