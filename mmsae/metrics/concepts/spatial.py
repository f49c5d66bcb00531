"""Do the patches at which a latent fires lie together? Moran's I on the patch grid (Moran 1950; visaebench's M1).

For one image and latent, with c the activations of P patches less their mean and w the 0/1 matrix of the eight
neighbours: ``I = (P / sum(w)) * sum_pq(w_pq c_p c_q) / sum_p(c_p^2)``. It is near 1 where active patches are one area,
-1 / (P - 1) on average where the same values lie anywhere, and negative on a chessboard.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmsae.metrics.sparsity import latent_sums
from mmsae.types import Codes

FLAT = 1e-10  # sums of squares up to this are of a constant map


def neighbours(x: Tensor) -> Tensor:
    """``(B, H, W, F)`` sums over the (up to) eight neighbours of every cell."""
    rows = x.clone()
    rows[:, 1:] += x[:, :-1]
    rows[:, :-1] += x[:, 1:]
    out = rows.clone()
    out[:, :, 1:] += rows[:, :, :-1]
    out[:, :, :-1] += rows[:, :, 1:]
    return out - x


def morans_i(x: Tensor) -> Tensor:
    """``(B, F)`` float64 Moran's I of maps ``x (B, H, W, F)``; NaN where a map is constant."""
    c = x.double()
    c = c - c.mean((1, 2), keepdim=True)
    cells, links = c.shape[1] * c.shape[2], neighbours(torch.ones_like(c[:1, ..., :1])).sum()
    square = c.square().sum((1, 2))
    found = cells / links * (c * neighbours(c)).sum((1, 2)) / square
    return torch.where(square > FLAT, found, torch.nan)


class Localisation:
    """Means of Moran's I over images, latent by latent, from codes that pass by.

    An image counts for a latent that fires on at least ``least`` of its patches, and on at most ``most`` of them: what
    fires everywhere is together trivially.

    Args:
        d_sae: Number of latents.
        least: Patches.
        most: Share of the patches.
    """

    def __init__(self, d_sae: int, least: int = 5, most: float = 0.9) -> None:
        self.least, self.most = least, most
        self.total = torch.zeros(d_sae, dtype=torch.float64)
        self.count = torch.zeros(d_sae, dtype=torch.long)

    def add(self, z: Codes, grid: tuple[int, int], order: Tensor | None = None) -> None:
        """Add the codes of whole images, one image after the other, the patches of each row by row.

        Args:
            z: ``(n * H * W)`` rows.
            grid: H and W.
            order: ``(n, H * W)`` permutations in which the patches are laid on the grid, for a control.
        """
        height, width = grid
        cells = height * width
        for i in range(z.n // cells):  # the images of one batch, each by itself
            own = z.rows(slice(i * cells, (i + 1) * cells))
            active = latent_sums(own)[0]
            able = (active >= self.least) & (active <= int(self.most * cells))
            at = able.nonzero()[:, 0]
            maps = own.gather(at)  # few are able: most latents of a top-k code fire on fewer patches, or on none
            maps = maps if order is None else maps[order[i]]
            found = morans_i(maps.view(1, height, width, len(at)))[0].cpu()
            valid, at = ~found.isnan(), at.cpu()
            self.total[at[valid]] += found[valid]
            self.count[at[valid]] += 1

    def scores(self, images: int) -> Tensor:
        """``(d_sae,)`` means; NaN for latents with fewer than so many images."""
        return torch.where(self.count >= max(1, images), self.total / self.count.clamp(min=1), torch.nan)
