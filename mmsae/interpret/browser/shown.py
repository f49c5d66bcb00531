"""Which items a browser shows, and their codes, cut to the strongest latents of each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mmsae.interpret.browser.options import Display
from mmsae.interpret.browser.segments import ranges
from mmsae.interpret.evidence.folder import Evidence

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

BLOCK = 4096  # items whose codes are cut at a time


class ShownItems(NamedTuple):
    """The m items that a browser shows, numbered as they first appear when latents are read in order: what belongs to
    one latent lies together.
    """

    item: np.ndarray  #: ``(m,) int32`` their places in the evidence
    number: np.ndarray  #: ``(n,) int32`` the number of each item of the evidence, -1 where it is not shown
    pairs: Mapping[str, np.ndarray]  #: ``{modality: (d_sae, p)}`` items of each latent, top ones first; -1 for none
    top: int  #: How many of the p are top items
    quantiles: Mapping[str, int]  #: How many quantiles the rest is from, equally many from each

    @property
    def m(self) -> int:
        """Number of items."""
        return len(self.item)


def choose(evidence: Evidence, display: Display) -> ShownItems:
    """The top items of all latents and some of each quantile."""
    pairs, quantiles, n_top = {}, {}, 0
    for m in evidence.modalities:
        top = np.asarray(evidence.top(m).item)[:, : display.top]
        drawn = np.asarray(evidence.quantiles(m))[:, :, : display.each]
        n_top = top.shape[1]
        quantiles[m] = drawn.shape[1]
        pairs[m] = np.concatenate([top, drawn.reshape(len(drawn), -1)], 1)
    order = np.concatenate(list(pairs.values()), 1).ravel()
    item, first = np.unique(order, return_index=True)
    keep = item >= 0
    item = item[keep][np.argsort(first[keep])].astype(np.int32)
    number = np.full(evidence.n, -1, np.int32)
    number[item] = np.arange(len(item))
    return ShownItems(item, number, pairs, n_top, quantiles)


def strongest(evidence: Evidence, modality: str, items: np.ndarray, limit: int) -> csr_matrix:
    """``(len(items), d_sae)`` pooled codes of some items, ``limit`` at most of each: those that are largest beside
    their latents' maxima.
    """
    from scipy.sparse import csr_matrix, vstack

    codes, most = evidence.codes(modality), np.maximum(evidence.stats(modality).max, 1e-30)
    parts = []
    for lo in range(0, len(items), BLOCK):
        some = np.asarray(items[lo : lo + BLOCK])
        size = (codes.start[some + 1] - codes.start[some]).astype(np.int64)
        at = ranges(codes.start[some], size)
        latent, value = np.asarray(codes.index[at]), np.asarray(codes.value[at])
        row = np.repeat(np.arange(len(some)), size)
        if len(size) and size.max() > limit:
            order = np.lexsort((-np.abs(value) / most[latent], row))
            keep = np.sort(order[np.arange(len(row)) - np.searchsorted(row, row) < limit])
            row, latent, value = row[keep], latent[keep], value[keep]
        start = np.searchsorted(row, np.arange(len(some) + 1))
        parts.append(csr_matrix((value, latent, start), shape=(len(some), evidence.d_sae)))
    return vstack(parts, "csr") if parts else csr_matrix((0, evidence.d_sae), dtype=np.float32)
