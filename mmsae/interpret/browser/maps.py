"""Where latents fire in samples: positions and values of their patches or tokens, packed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from mmsae.interpret.browser.files import indices, packed, share_of
from mmsae.interpret.browser.segments import bisect, ranges, starts

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

    from mmsae.interpret.evidence.folder import TokenTable


def entries(table: TokenTable, item: np.ndarray, latent: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where latents fire in items, pair by pair.

    Args:
        table: What fires in the rows of the items in evidence.
        item: ``(p,)`` items; of those that are not in evidence (-1, too) nothing is known.
        latent: ``(p,)``.

    Returns:
        ``(p,) int64`` numbers of entries, and the places of all entries in the table, one pair after the other.
    """
    size, first = np.zeros(len(item), np.int64), np.zeros(len(item), np.int64)
    if len(table.items):
        place = np.minimum(np.searchsorted(table.items, item), len(table.items) - 1)
        has = (item >= 0) & (table.items[place] == item)
        low, high = (bisect(table.start, table.latent, place[has], latent[has], side) for side in ("left", "right"))
        first[has], size[has] = low, high - low
    return size, ranges(first, size)


def pair_maps(
    table: TokenTable, item: np.ndarray, latent: np.ndarray, group: np.ndarray, places: int
) -> dict[str, Any]:
    """``size`` of each pair, ``position`` and ``value`` of all entries, and the ``upper`` bound of each group of pairs,
    of which values are shares.

    Args:
        table: What fires in the rows of the items in evidence.
        item: ``(p,)`` items.
        latent: ``(p,)`` latents.
        group: ``(p,)`` pairs that share one scale, from 0 and without gaps.
        places: Number of positions.
    """
    size, at = entries(table, item, latent)
    value = np.abs(np.asarray(table.value[at])) if len(at) else np.zeros(0, np.float32)
    owner = np.repeat(group, size)
    upper = np.zeros(int(group.max(initial=-1)) + 1, np.float32)
    np.maximum.at(upper, owner, value)
    position = np.asarray(table.position[at]) if len(at) else np.zeros(0, np.int32)
    return {
        "size": packed(size, "u2" if places < 65536 else "i4"),
        "position": packed(position, "u1" if places <= 256 else "u2" if places <= 65536 else "i4"),
        "value": share_of(value, upper[owner], "u1"),
        "upper": packed(upper),
    }


def sample_maps(table: TokenTable, items: np.ndarray, kept: csr_matrix, places: int) -> dict[str, Any]:
    """The maps of some latents of some items, each beside its own maximum in the item.

    Args:
        table: What fires in the rows of the items in evidence.
        items: ``(n,)``.
        kept: ``(n, d_sae)``; its entries say whose maps.
        places: Number of positions.

    Returns:
        What :func:`pair_maps` gives, ``latent`` of each map, and ``start`` ``(n + 1,)``, the first map of each item.
    """
    item, latent = np.repeat(items, np.diff(kept.indptr)), kept.indices
    out = pair_maps(table, item, latent, np.arange(len(item)), places)
    return {"start": packed(starts(np.diff(kept.indptr)), "i4"), "latent": indices(latent, kept.shape[1]), **out}
