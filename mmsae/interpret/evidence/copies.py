"""Near-duplicates: images that look the same, captions that read the same.

Images: pairs whose difference hashes (dHash, 64 bits) differ in at most 3 bits are found by banding (of four bands one
is equal then), and compared by their mean colours in 16 x 16 cells, so that two scenes that differ in one object are
two. Which item of a group stands for it depends on uids alone, not on the order of shards.
"""

from __future__ import annotations

import numpy as np

BITS = 3  # of 64, in which the hashes of near-duplicates may differ
LEVELS = 24  # of 255, by which their mean colours may differ in any cell
NEAREST = 256  # in larger buckets (flat images) only so many neighbours in order of brightness are compared
ROWS = 4096  # items whose colours are in memory at a time
PAIRS = 1 << 18  # pairs whose colours are compared at a time


def equal_groups(key: np.ndarray) -> np.ndarray:
    """``(n,)`` for every item the first index with its key; items with key 0 are alone."""
    _, first, inverse = np.unique(key, return_index=True, return_inverse=True)
    own = first[inverse.ravel()]
    return np.where(key == 0, np.arange(len(key)), own)


def near_groups(dhash: np.ndarray, signature: np.ndarray, has_image: np.ndarray) -> np.ndarray:
    """``(n,)`` for every item an index that near-duplicates share.

    Args:
        dhash: ``(n,) int64``.
        signature: ``(n, CELLS, CELLS, 3) uint8``, may lie in a map.
        has_image: ``(n,)`` items without are alone.
    """
    n = len(dhash)
    parent = np.arange(n)
    items = np.flatnonzero(has_image)
    if not len(items):
        return parent
    brightness = _brightness(signature, items)
    same = np.lexsort((items, brightness, dhash[items]))
    _merge(parent, _equal_neighbours(items[same], dhash, signature))  # exact copies, however many
    alone = items[parent[items] == items]
    light = brightness[np.searchsorted(items, alone)]
    bits = dhash.view(np.uint64)
    for shift in (0, 16, 32, 48):
        band = (bits[alone] >> np.uint64(shift)) & np.uint64(0xFFFF)
        order = np.lexsort((alone, light, band))
        for left, right in _candidates(alone[order], band[order]):
            near = np.bitwise_count(bits[left] ^ bits[right]) <= BITS
            left, right = left[near], right[near]
            for lo in range(0, len(left), PAIRS):
                a, b = left[lo : lo + PAIRS], right[lo : lo + PAIRS]
                _merge(parent, np.stack([a, b], 1)[_alike(signature, a, b)])
    return _find(parent, parent)


def first_of_group(group: np.ndarray, rank: np.ndarray) -> np.ndarray:
    """``(n,) int32`` the item of each group with the smallest ``rank`` for all its others, -1 for itself."""
    order = np.lexsort((rank, group))
    start = np.ones(len(group), bool)
    start[1:] = group[order][1:] != group[order][:-1]
    lead = order[start][np.cumsum(start) - 1]
    out = np.full(len(group), -1, np.int32)
    out[order] = np.where(lead == order, -1, lead)
    return out


def common_groups(groups: list[np.ndarray]) -> np.ndarray:
    """Groups of items that are together in all of some groupings."""
    both = groups[0]
    for other in groups[1:]:
        _, both = np.unique(np.stack([both, other], 1), axis=0, return_inverse=True)
    return both.ravel()


def _brightness(signature: np.ndarray, items: np.ndarray) -> np.ndarray:
    out = np.empty(len(items), np.float32)
    for lo in range(0, len(items), ROWS):
        out[lo : lo + ROWS] = signature[items[lo : lo + ROWS]].mean((1, 2, 3))
    return out


def _equal_neighbours(order: np.ndarray, dhash: np.ndarray, signature: np.ndarray) -> np.ndarray:
    """Pairs of neighbours in an order that are equal."""
    pairs = []
    for lo in range(0, len(order) - 1, ROWS):
        a, b = order[lo : lo + ROWS][: len(order) - 1 - lo], order[lo + 1 : lo + ROWS + 1]
        same = dhash[a] == dhash[b]
        a, b = a[same], b[same]
        pairs.append(np.stack([a, b], 1)[(signature[a] == signature[b]).all((1, 2, 3))])
    return np.concatenate(pairs) if pairs else np.zeros((0, 2), np.int64)


def _candidates(items: np.ndarray, band: np.ndarray):
    """Pairs ``(left, right)`` of items whose band is equal, by their distance in the order."""
    for step in range(1, min(NEAREST, len(items) - 1) + 1):
        same = band[step:] == band[:-step]
        if not same.any():
            return
        yield items[:-step][same], items[step:][same]


def _alike(signature: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    out = np.empty(len(a), bool)
    for lo in range(0, len(a), ROWS):
        at = slice(lo, lo + ROWS)
        out[at] = np.abs(signature[a[at]].astype(np.int16) - signature[b[at]]).max((1, 2, 3)) <= LEVELS
    return out


def _merge(parent: np.ndarray, pairs: np.ndarray) -> None:
    """Join the groups of pairs: their roots point at the smallest of them."""
    if not len(pairs):
        return
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    roots = _find(parent, pairs.ravel())
    nodes, local = np.unique(roots, return_inverse=True)
    left, right = local.reshape(-1, 2).T
    graph = coo_matrix((np.ones(len(left), bool), (left, right)), shape=(len(nodes),) * 2)
    _, label = connected_components(graph, directed=False)
    least = np.full(label.max() + 1, len(parent))
    np.minimum.at(least, label, nodes)
    parent[nodes] = least[label]


def _find(parent: np.ndarray, nodes: np.ndarray) -> np.ndarray:
    """The roots of some nodes."""
    while True:
        up = parent[nodes]
        if (up == nodes).all():
            return nodes
        nodes = up
