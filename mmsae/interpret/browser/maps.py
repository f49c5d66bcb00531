"""Where latents fire in samples: positions and values of their patches or tokens, packed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mmsae.interpret.browser.files import indices, packed, share_of
from mmsae.interpret.browser.segments import bisect, ranges, starts
from mmsae.interpret.browser.shown import ShownItems, strongest

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

    from mmsae.interpret.evidence.folder import Evidence, TokenTable

DRAWN = 2048  # latents, and samples, that sizes are estimated by
CODED = 4 / 3  # base64


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
    table: TokenTable, item: np.ndarray, latent: np.ndarray, group: np.ndarray, places: int, most: int = 0
) -> dict[str, Any]:
    """``size`` of each pair, ``position`` and ``value`` of all entries, and the ``upper`` bound of each group of pairs,
    of which values are shares.

    Args:
        table: What fires in the rows of the items in evidence.
        item: ``(p,)`` items.
        latent: ``(p,)`` latents.
        group: ``(p,)`` pairs that share one scale, from 0 and without gaps.
        places: Number of positions.
        most: Entries of a pair that are kept, the strongest; 0: all.
    """
    size, at = entries(table, item, latent)
    value = np.abs(np.asarray(table.value[at])) if len(at) else np.zeros(0, np.float32)
    if most and size.max(initial=0) > most:
        pair, first = np.repeat(np.arange(len(size)), size), np.cumsum(size) - size
        order = np.lexsort((-value, pair))
        keep = np.sort(order[np.arange(len(pair)) - first[pair] < most])
        at, value, size = at[keep], value[keep], np.minimum(size, most)
    owner = np.repeat(group, size)
    upper = np.zeros(int(group.max(initial=-1)) + 1, np.float32)
    np.maximum.at(upper, owner, value)
    position = np.asarray(table.position[at]) if len(at) else np.zeros(0, np.int32)
    kinds = _kinds(places)
    return {
        "size": packed(size, kinds[0]),
        "position": packed(position, kinds[1]),
        "value": share_of(value, upper[owner], "u1"),
        "upper": packed(upper),
    }


def _kinds(places: int) -> tuple[str, str]:
    """How sizes and positions are packed."""
    return "u2" if places < 65536 else "i4", "u1" if places <= 256 else "u2" if places <= 65536 else "i4"


class MapLimits(NamedTuple):
    """How many maps are kept of one modality, so that they take no more than they may."""

    latents: int  #: Latents of a sample, the strongest
    places: int  #: Places of an example, the strongest; 0: all


def map_limits(
    evidence: Evidence, shown: ShownItems, modality: str, places: int, latents: int, budget: float
) -> MapLimits:
    """What fits into some bytes, by the sizes of evenly drawn examples and samples.

    Examples come first and may take two thirds where samples have maps, too: they are what a latent is known by.

    Args:
        evidence: The evidence.
        shown: The items that are shown.
        modality: Whose maps.
        places: Number of positions.
        latents: Latents of a sample that there are maps of at most.
        budget: Bytes.
    """
    table, pairs = evidence.all_tokens(modality), shown.pairs[modality]
    size_bytes, position_bytes = (int(kind[1]) for kind in _kinds(places))
    rows = np.unique(np.linspace(0, len(pairs) - 1, min(DRAWN, len(pairs))).astype(int))
    size, _ = entries(table, pairs[rows].ravel(), np.repeat(rows, pairs.shape[1]))

    def examples(most: int) -> float:
        kept = np.minimum(size, most) if most else size
        return CODED * len(pairs) / len(rows) * (kept.sum() * (position_bytes + 1) + len(size) * size_bytes)

    most = 0
    allowed = budget * (2 / 3 if latents else 1)
    if examples(0) > allowed:
        fits = [m for m in range(1, int(size.max())) if examples(m) <= allowed]
        most = max(fits, default=1)
    left = budget - examples(most)
    items = shown.item[np.unique(np.linspace(0, shown.m - 1, min(DRAWN, shown.m)).astype(int))]
    while latents:
        kept = strongest(evidence, modality, items, latents)
        found, _ = entries(table, np.repeat(items, np.diff(kept.indptr)), kept.indices)
        each = size_bytes + 4 + (2 if evidence.d_sae < 65535 else 4)  # beside its entries: size, upper, latent
        if CODED * shown.m / len(items) * (found.sum() * (position_bytes + 1) + len(found) * each) <= left:
            break
        latents -= 1
    return MapLimits(latents, most)


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
