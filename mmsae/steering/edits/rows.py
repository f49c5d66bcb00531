"""The rows of a site as samples and maps: which belong to one sample, which lie side by side, what may replace them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mmsae.hosts.sites import COND, Where
from mmsae.types import InputError


def group(where: Where) -> Tensor:
    """``(N,)`` number of each row's sample: its item, once per guidance branch."""
    return where.item * 2 + (COND if where.branch is None else where.branch)


def dilate(mask: Tensor, where: Where, radius: int) -> Tensor:
    """``(N,) bool`` grown by ``radius`` cells in all directions, within each sample's own map.

    Raises:
        InputError: A radius at a site that is no map.
    """
    if not radius:
        return mask
    if where.grid is None or where.position is None:
        raise InputError(f"dilate = {radius} at a site that is no map")
    g, (h, w) = group(where), where.grid
    cells = torch.zeros(int(g.max()) + 1, h * w, device=mask.device)
    cells[g, where.position] = mask.to(cells)
    grown = F.max_pool2d(cells.view(-1, 1, h, w), 2 * radius + 1, 1, radius).flatten(1)
    return grown[g, where.position] > 0


def mean_donor(rows: Tensor, where: Where, mask: Tensor, residual: Tensor) -> Tensor:
    """``(N, d)``: the mean of a sample's other rows plus what the SAE does not explain of the row itself.

    ``mask (N,)`` marks rows that will be replaced; samples without other rows keep theirs. ``residual (N, d)`` is ``x -
    dec(z)``.
    """
    g = group(where)
    n = int(g.max()) + 1 if len(g) else 0
    free = (~mask).to(rows)
    count = rows.new_zeros(n).index_add_(0, g, free)
    mean = rows.new_zeros(n, rows.shape[1]).index_add_(0, g, rows * free[:, None]) / count.clamp(min=1)[:, None]
    return torch.where((count > 0)[g][:, None], mean[g] + residual, rows)


def only(where: Where, which: Tensor) -> Where:
    """The rows ``which (N,) bool`` of a :class:`Where`."""
    names = ("item", "position", "image", "special", "branch")
    return where._replace(**{n: None if (t := getattr(where, n)) is None else t[which] for n in names})
