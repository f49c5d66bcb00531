"""Codes of token sites seen per item: which latents an item's tokens activate, and how strongly at most.

Everything is a flat list of (item, latent) pairs, so that no ``(items, d_sae)`` matrix is made.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mmsae.types import Codes, InputError, Tokens


class Entries(NamedTuple):
    """The activations above 0 of N rows, as a list."""

    row: Tensor  #: ``(E,)`` int64
    latent: Tensor  #: ``(E,)`` int64
    value: Tensor  #: ``(E,)`` float


def entries(codes: Codes) -> Entries:
    """Every ``(row, latent, value)`` with a positive value.

    Raises:
        InputError: Codes with signs: a latent whose two poles say opposite things has no one largest activation.
    """
    v = codes.values.detach()
    if (v < 0).any():
        raise InputError("codes pooled by item and cross-modal weights need codes without signs, these have values < 0")
    row, col = (v > 0).nonzero(as_tuple=True)
    return Entries(row, col if codes.indices is None else codes.indices[row, col], v[row, col])


class ItemCodes(NamedTuple):
    """Max-pooled codes of B items, sorted by item and latent."""

    key: Tensor  #: ``(E,)`` int64 ``item * d_sae + latent``, ascending and unique
    value: Tensor  #: ``(E,)`` the largest activation of that latent among the item's tokens
    d_sae: int  #: Number of latents

    @property
    def item(self) -> Tensor:
        """``(E,)`` item of every entry."""
        return self.key // self.d_sae

    @property
    def latent(self) -> Tensor:
        """``(E,)`` latent of every entry."""
        return self.key % self.d_sae

    def above(self, delta: float) -> ItemCodes:
        """The entries with a value above ``delta``."""
        on = self.value > delta
        return ItemCodes(self.key[on], self.value[on], self.d_sae)

    def common(self, other: ItemCodes) -> tuple[Tensor, Tensor]:
        """Positions, here and in ``other``, of the (item, latent) pairs that both have."""
        if not len(other.key):
            return other.key, other.key
        at = torch.searchsorted(other.key, self.key).clamp(max=len(other.key) - 1)
        mine = (other.key[at] == self.key).nonzero()[:, 0]
        return mine, at[mine]

    def union(self, other: ItemCodes) -> ItemCodes:
        """Larger of the two values for every pair that either has."""
        return _pool(torch.cat([self.key, other.key]), torch.cat([self.value, other.value]), self.d_sae)

    def codes(self, n: int, modality: str | None = None) -> Codes:
        """One row of codes for each of ``n`` items, filled up with latents of value 0 to the length of the longest."""
        device = self.key.device
        count = torch.bincount(self.item, minlength=n)
        place = torch.arange(len(self.key), device=device) - (count.cumsum(0) - count)[self.item]
        k = max(1, int(count.max())) if n else 1
        values = self.value.new_zeros(n, k)
        values[self.item, place] = self.value
        # filling: the j-th id that a row lacks is j plus the number of its ids p_i (ascending) with p_i - i <= j
        before = torch.full((n, k), self.d_sae, device=device)
        before[self.item, place] = self.latent - place
        j = (torch.arange(k, device=device) - count[:, None]).clamp(min=0)
        indices = j + torch.searchsorted(before, j, right=True)
        indices[self.item, place] = self.latent
        return Codes(values, indices, self.d_sae, modality)


def _pool(key: Tensor, value: Tensor, d_sae: int) -> ItemCodes:
    key, inverse = key.unique(return_inverse=True)
    best = value.new_zeros(len(key)).scatter_reduce_(0, inverse, value, "amax")
    return ItemCodes(key, best, d_sae)


def max_pool(codes: Codes, item: Tensor) -> ItemCodes:
    """Max-pool codes of N rows that belong to ``item (N,)``."""
    e = entries(codes)
    return _pool(item[e.row] * codes.d_sae + e.latent, e.value, codes.d_sae)


def content_rows(tokens: Tokens, modality: str) -> Tensor:
    """``(N,)`` bool: rows that are content: no BOS, EOS, template or padding token; all rows without flags."""
    flags = None if tokens.special is None else tokens.special.get(modality)
    return torch.ones_like(tokens.item[modality], dtype=torch.bool) if flags is None else ~flags


def check_rows(codes: Codes, tokens: Tokens, modality: str) -> None:
    """Refuse codes that were not made of these tokens.

    Raises:
        InputError: The numbers of rows differ.
    """
    if codes.n != len(tokens.item[modality]):
        raise InputError(f"{codes.n} rows of {modality} codes for {len(tokens.item[modality])} {modality} tokens")
