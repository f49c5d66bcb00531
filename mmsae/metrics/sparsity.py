"""How often each latent fires: L0, density, dead and hub latents, from streaming integer counts."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from mmsae.types import Codes


def summed(codes: Codes, values: Tensor) -> Tensor:
    """``(d_sae,)`` sum over rows of values that stand where those of the codes do."""
    if codes.indices is None:
        return values.sum(0)
    return values.new_zeros(codes.d_sae).scatter_add_(0, codes.indices.flatten(), values.flatten())


def latent_sums(codes: Codes) -> tuple[Tensor, Tensor]:
    """``(d_sae,)`` int64 number of rows each latent fired in, and ``(d_sae,)`` float64 sum of its squared values."""
    v = codes.values.detach()
    return summed(codes, (v != 0).long()), summed(codes, v.double().square())


class SparsityStats(NamedTuple):
    """What :class:`Sparsity` computes."""

    l0: Tensor  #: Mean number of latents that fired per row
    dead_fraction: Tensor  #: Share of latents that never fired
    hub_fraction: Tensor  #: Share of latents that fired in more than ``hub`` of the rows
    density: Tensor  #: ``(d_sae,)`` float64 share of rows in which each latent fired
    energy: Tensor  #: ``(d_sae,)`` float64 mean squared value of each latent
    rows: Tensor  #: Number of rows seen


class Sparsity(Metric):
    """Firing statistics of one modality's codes; exact sums over ranks.

    A latent that fires in more than the share ``hub`` of the rows is a hub.
    """

    full_state_update = False

    def __init__(self, d_sae: int, hub: float = 0.1, **kwargs):
        super().__init__(**kwargs)
        self.hub = hub
        self.add_state("rows", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("fired", torch.zeros(d_sae, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("square", torch.zeros(d_sae, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, codes: Codes) -> None:
        """Count one batch."""
        fired, square = latent_sums(codes)
        self.rows = self.rows + codes.n
        self.fired = self.fired + fired
        self.square = self.square + square

    def compute(self) -> SparsityStats:
        """Statistics over everything seen; NaN densities when no row was seen."""
        density = self.fired.double() / self.rows
        return SparsityStats(
            l0=density.sum(),
            dead_fraction=(self.fired == 0).double().mean(),
            hub_fraction=(density > self.hub).double().mean(),
            density=density,
            energy=self.square / self.rows,
            rows=self.rows,
        )


def sparsity(codes: Codes, hub: float = 0.1) -> SparsityStats:
    """:class:`Sparsity` of one set of codes."""
    metric = Sparsity(codes.d_sae, hub).to(codes.values.device)
    metric.update(codes)
    return metric.compute()
