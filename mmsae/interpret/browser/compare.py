"""Latents of two SAEs beside each other: the nearest by atoms and by activations, from both sides.

Who is matched, born or died follows in the page from a threshold on these figures: matched are mutual nearest latents
above it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mmsae.interpret.browser.files import indices, packed, put
from mmsae.interpret.browser.relations import BUDGET, blocks, nearest_rows, sample_rows
from mmsae.interpret.browser.segments import best_of_rows
from mmsae.interpret.evidence.folder import Evidence

LEAST = 50  # items in common, to correlate activations on


class Match(NamedTuple):
    """The nearest latent of the other SAE, from both sides; missing arrays where it cannot be known."""

    cosine: tuple[np.ndarray, np.ndarray] | None  #: ``(place, cosine)`` of the first SAE's latents, each ``(d_sae,)``
    cosine_back: tuple[np.ndarray, np.ndarray] | None  #: Of the second's
    correlation: tuple[np.ndarray, np.ndarray] | None  #: ``(place, Pearson r)`` of pooled codes on items in common
    correlation_back: tuple[np.ndarray, np.ndarray] | None  #: Of the second's
    items: int  #: Items in common that the correlation is over


def match(a: Evidence, b: Evidence, atoms: tuple[Any, Any], seed: int = 0) -> Match:
    """Compare two SAEs by their evidence on the same items, and by atoms of equal width.

    Args:
        a: Evidence of the first.
        b: Evidence of the second.
        atoms: ``(d_sae, d)`` of each, or None.
        seed: Draws the items where there are too many.
    """
    cosine = back = None
    if atoms[0] is not None and atoms[1] is not None and atoms[0].shape[1] == atoms[1].shape[1]:
        cosine, back = (tuple(x[:, 0] for x in nearest_rows(p, q, 1)) for p, q in (atoms, atoms[::-1]))
    place = {u: i for i, u in enumerate(b.items.uid)}
    pairs = np.array([(i, place[u]) for i, u in enumerate(a.items.uid) if u in place], np.int64).reshape(-1, 2)
    both = [m for m in a.modalities if m in b.modalities]
    if len(pairs) < LEAST or not both:
        return Match(cosine, back, None, None, len(pairs))
    x, y, n = _codes(a, b, pairs, both, seed)
    found = _pearson(x, y)
    return Match(cosine, back, _first(found), _first(found.T.tocsr()), n)


def _codes(a: Evidence, b: Evidence, pairs: np.ndarray, modalities: list[str], seed: int):
    """Pooled codes of the items in common, all modalities one after the other, as many as the budget allows."""
    from scipy.sparse import vstack

    xs, ys, n = [], [], len(pairs)
    for m in modalities:
        first, second = a.codes(m), b.codes(m)
        some = sample_rows(first, seed, BUDGET / len(modalities))
        mine = pairs[np.isin(pairs[:, 0], some)]
        xs.append(first.matrix(mine[:, 0]))
        ys.append(second.matrix(mine[:, 1]))
        n = min(n, len(mine))
    return vstack(xs, "csr"), vstack(ys, "csr"), n


def _pearson(x: Any, y: Any):
    """``(d_x, d_y)`` CSR of the correlations of columns that are ever non-zero together."""
    from scipy.sparse import vstack

    n, parts, turned, y = x.shape[0], [], abs(x).T.tocsr(), abs(y).tocsr()
    mean_y = np.asarray(y.mean(0)).ravel()
    std_y = np.sqrt(np.maximum(np.asarray(y.multiply(y).mean(0)).ravel() - mean_y**2, 0))
    for part in blocks(x.shape[1], y.shape[1]):
        rows = turned[part]
        mean = np.asarray(rows.mean(1)).ravel()
        std = np.sqrt(np.maximum(np.asarray(rows.multiply(rows).mean(1)).ravel() - mean**2, 0))
        both = (rows @ y).tocsr()
        row = np.repeat(np.arange(both.shape[0]), np.diff(both.indptr))
        spread = std[row] * std_y[both.indices]
        r = (both.data / n - mean[row] * mean_y[both.indices]) / np.where(spread > 0, spread, 1)
        both.data = np.where(spread > 0, r, 0)
        parts.append(both)
    return vstack(parts, "csr")


def _first(found: Any) -> tuple[np.ndarray, np.ndarray]:
    place, r = best_of_rows(found, 1)
    return place[:, 0], r[:, 0]


def write_match(folder: Path, found: Match, sizes: tuple[int, int]) -> None:
    """Write ``compare.js``; ``sizes`` are the numbers of latents of both."""

    def side(by: tuple[np.ndarray, np.ndarray] | None, size: int) -> Any:
        return by and {"to": indices(by[0], size), "value": packed(by[1], "f4")}

    a, b = sizes
    put(
        folder,
        "compare",
        {
            "items": found.items,
            "main": {"cosine": side(found.cosine, b), "correlation": side(found.correlation, b)},
            "other": {"cosine": side(found.cosine_back, a), "correlation": side(found.correlation_back, a)},
        },
    )
