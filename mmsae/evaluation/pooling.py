"""One row per image of the rows of images: sums over the rows, pooled codes.

At a pooled site an image has one row. At a token site it has many, which are not held: what figures need of them is
summed here while they pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mmsae.types import Codes

TINY = 1e-12
CHUNK = 8192  # rows at a time in float64


class Sums(NamedTuple):
    """Sums over the rows of each of n images, all ``(n,)`` float64; x are activations, x_hat their reconstructions."""

    rows: Tensor  #: Number of rows
    within: Tensor  #: ``|x - mean|^2`` about the image's own mean
    square: Tensor  #: ``|x|^2``
    error: Tensor  #: ``|x - x_hat|^2``
    recon: Tensor  #: ``|x_hat|^2``
    dot: Tensor  #: ``x x_hat``
    cosine: Tensor  #: Cosine of x and x_hat
    ratio: Tensor  #: ``|x_hat| / |x|``
    active: Tensor  #: Latents that fire

    @classmethod
    def of(cls, x: Tensor, recon: Tensor, z: Codes, item: Tensor, n: int) -> Sums:
        """The sums over rows ``(N, d)``, their reconstructions and codes; ``item (N,)`` is the image of each."""
        rows = torch.bincount(item, minlength=n).double()
        mean = _total(x, item, n) / rows.clamp(min=1)[:, None]
        out = torch.zeros(len(cls._fields) - 1, n, dtype=torch.float64)
        for at in (slice(lo, lo + CHUNK) for lo in range(0, len(x), CHUNK)):
            a, b, own = x[at].double(), recon[at].double(), item[at]
            norm = a.norm(dim=1).clamp(min=TINY)
            figures = ((a - mean[own]).square().sum(1), a.square().sum(1), (a - b).square().sum(1),
                       b.square().sum(1), (a * b).sum(1), torch.cosine_similarity(a, b), b.norm(dim=1) / norm,
                       (z.values[at] != 0).sum(1).double())  # fmt: skip
            for total, figure in zip(out, figures, strict=True):
                total.index_add_(0, own, figure)
        return cls(rows, *out)

    def spread(self, mean: Tensor) -> Tensor:
        """``(n,)`` sums of ``|x - m|^2`` about the mean m of all rows, from the images' means ``mean (n, d)``."""
        mean = mean.double()
        centre = (self.rows[:, None] * mean).sum(0) / self.rows.sum()
        return self.within + self.rows * (mean - centre).square().sum(1)


class TokenMeans(NamedTuple):
    """What is held of the rows of n images at a token site, beside :class:`Sums`."""

    x: Tensor  #: ``(n, d)`` mean of the normalised activations
    z: Tensor  #: ``(n, k)`` mean of the codes, entry by entry of the pooled codes
    fires: Tensor  #: ``(n, k)`` int32 number of rows in which each of these latents fires


class Through(NamedTuple):
    """What an SAE makes of n images."""

    z: Codes  #: Codes of n rows (token sites: largest or mean value over the tokens, see ``Features.pool``)
    recon: Tensor  #: ``(n, d)`` reconstructions in the units of x (token sites: mean over the image's tokens)
    sums: Sums  #: Sums over the rows of each image (pooled sites: one row)
    tokens: TokenMeans | None = None  #: Token sites: further means over the tokens; else None

    def rows(self, at: Tensor) -> Through:
        """Some of the images, by their indices."""
        pick = lambda t: type(t)(*(v[at] for v in t))  # noqa: E731
        return Through(self.z.rows(at), self.recon[at], pick(self.sums), self.tokens and pick(self.tokens))

    @classmethod
    def stack(cls, parts: Sequence[Through]) -> Through:
        """Several batches as one."""
        z = Codes.stack([p.z for p in parts])
        sums = Sums(*(torch.cat(v) for v in zip(*(p.sums for p in parts), strict=True)))
        recon = torch.cat([p.recon for p in parts])
        if parts[0].tokens is None:
            return cls(z, recon, sums)
        wide = lambda t: torch.nn.functional.pad(t, (0, z.values.shape[1] - t.shape[1]))  # noqa: E731
        columns = [(t.x, wide(t.z), wide(t.fires)) for t in (p.tokens for p in parts)]
        return cls(z, recon, sums, TokenMeans(*(torch.cat(c) for c in zip(*columns, strict=True))))


def mean_rows(x: Tensor, item: Tensor, n: int) -> Tensor:
    """``(n, d)`` mean of the rows of each image, in the precision of x."""
    return (_total(x, item, n) / torch.bincount(item, minlength=n).clamp(min=1)[:, None]).to(x.dtype)


def _total(x: Tensor, item: Tensor, n: int) -> Tensor:
    out = torch.zeros(n, x.shape[1], dtype=torch.float64)
    for part, own in zip(x.split(CHUNK), item.split(CHUNK), strict=True):
        out.index_add_(0, own, part.double())
    return out


def pool_codes(z: Codes, item: Tensor, n: int, pool: str = "max") -> tuple[Codes, Tensor, Tensor]:
    """Codes of n images by ``max`` (sign kept) or ``mean`` over their rows; ``item (N,)`` says whose a row is.

    The n images are those of one batch. Their ``(n, d_sae)`` tables are made: 64 images of 196 rows and 16,384 latents
    take 60 ms and 12 MiB, less than a sort of the rows' entries.

    Returns:
        The pooled codes, with an entry for every latent that fires on the image, the largest first; and for the same
        entries the mean code and the number of rows that fire (:class:`TokenMeans`).
    """
    values = z.values
    at = (item[:, None] * z.d_sae + z.ids()).flatten()
    fires = torch.bincount(at[values.flatten() != 0], minlength=n * z.d_sae).view(n, z.d_sae)
    mean = z.pool(item, n)
    if pool == "mean":
        dense = mean
    else:
        ends = [values.new_zeros(n * z.d_sae).scatter_reduce_(0, at, values.flatten(), how) for how in ("amax", "amin")]
        dense = torch.where(ends[0] >= -ends[1], *ends).view(n, z.d_sae)
    k = max(1, int((fires != 0).sum(1).max()))
    indices = dense.abs().masked_fill(fires == 0, -torch.inf).topk(k, dim=1).indices
    pooled = Codes(dense.gather(1, indices), indices, z.d_sae, z.modality)
    return pooled, mean.gather(1, indices), fires.gather(1, indices).int()
