"""Which concepts go together: pairs by NPMI from sparse products, surprising ones, and what only one side says.

Within a modality, or across: the concepts of images against those of captions, which shows what pictures show and
captions never say. The product ``B^T B`` is made in blocks, of which only pairs with enough common items are kept; no
matrix of all pairs of latents is ever made. Within a modality the frequent latents come first and are dropped when
their pairs are known, so that each pair is counted once. (Section 9 of the toolkit of arXiv 2512.10092.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mmsae.interpret.analyse.corpora import counts
from mmsae.metrics.shares import npmi
from mmsae.types import InputError

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

CELLS = 4_000_000  # counts of pairs in memory at a time, at most
SHRUNK = 0.7  # share of the entries that are left when those before them are dropped, which copies the rest


class Correlations(NamedTuple):
    """The pairs of concepts that go together most, ``(m,)`` each, and the closest partner of every latent."""

    a: np.ndarray  #: Latents of the first side
    b: np.ndarray  #: Latents of the second side
    both: np.ndarray  #: Items in which both are
    npmi: np.ndarray  #: How far they go together, -1 to 1, largest first
    counts: tuple[np.ndarray, np.ndarray]  #: ``(d_sae,)`` items in which each concept of either side is
    #: ``(d_sae,)`` of each side: the concept of the other side that it goes with most, and how far; -1 and -1 for those
    #: that meet none often enough
    partner: tuple[np.ndarray, np.ndarray]
    closeness: tuple[np.ndarray, np.ndarray]
    #: ``(d_sae,)`` how far a latent goes with itself on the other side, -1 where it is there too rarely; empty within
    own: np.ndarray
    n: int  #: Items
    least: int  #: Items that a pair needed in common

    def rows(self, names: Mapping[int, str]) -> list[dict[str, Any]]:
        """A row for every pair."""
        n_a, n_b = self.counts
        return [
            {"a": i, "b": j, "name_a": names.get(i, ""), "name_b": names.get(j, ""), "both": c, "n_a": int(n_a[i]),
             "n_b": int(n_b[j]), "npmi": v, "alike": alike(names.get(i, ""), names.get(j, ""))}
            for i, j, c, v in zip(self.a.tolist(), self.b.tolist(), self.both.tolist(), self.npmi.tolist(), strict=True)
        ]  # fmt: skip

    def unsaid(self, side: int, names: Mapping[int, str]) -> list[dict[str, Any]]:
        """Concepts of one side (0 or 1) by how little the other side says of them, the least first.

        Both counts matter: a concept that captions never name has no close partner there, and the same latent fires on
        captions rarely or elsewhere.
        """
        mine, other = self.counts[side], self.counts[1 - side]
        partner, close = self.partner[side], self.closeness[side]
        order = np.flatnonzero(mine >= self.least)
        order = order[np.lexsort((-mine[order], close[order]))]
        return [
            {"latent": j, "name": names.get(j, ""), "items": int(mine[j]), "same_latent_there": int(other[j]),
             "npmi_with_itself": float(self.own[j]) if len(self.own) else None, "partner": int(partner[j]),
             "partner_name": names.get(int(partner[j]), ""), "npmi_with_partner": float(close[j])}
            for j in order.tolist()
        ]  # fmt: skip


def correlate(
    x: csr_matrix, y: csr_matrix | None = None, *, least: int = 20, pairs: int = 10_000, cells: int = CELLS
) -> Correlations:
    """The pairs of concepts that go together most.

    Args:
        x: ``(n, d_sae)`` 0 and 1, ``int32``.
        y: The other side's of the same items; None: pairs are within x, each once.
        least: Items that a pair needs in common.
        pairs: Pairs that are kept.
        cells: Counts in memory at a time.

    Raises:
        InputError: Sides of different items.
    """
    if y is not None and y.shape[0] != x.shape[0]:
        raise InputError(f"sides of {x.shape[0]} and {y.shape[0]} items do not correlate: they must be the same items")
    within, other = y is None, x if y is None else y
    n, d = x.shape
    size = counts(x), counts(other)
    kept = tuple(np.flatnonzero(s >= least) for s in size)  # rarer ones have no pair
    if within:  # the frequent ones first: what is left to multiply shrinks fast
        kept = (kept[0][np.argsort(-size[0][kept[0]], kind="stable")],) * 2
    left, right = x.tocsc()[:, kept[0]].T.tocsr(), other.tocsc()[:, kept[1]].tocsr()
    partner, closeness = ([np.full(d, v) for _ in size] for v in (-1, -1.0))
    if within:  # both sides are one
        partner[1], closeness[1] = partner[0], closeness[0]
    own = np.full(0 if within else d, -1.0)
    best = [np.zeros(0, int)] * 2 + [np.zeros(0, int), np.zeros(0)]
    ahead, lo, gone = size[0][kept[0]], 0, 0
    while lo < len(kept[0]):
        block = max(1, cells // max(right.shape[1], 1))
        together = (left[lo : lo + block] @ right).tocoo()
        row, column = together.row + lo, together.col + gone
        on = together.data >= least
        lo += block
        if within:
            on &= row < column
            if ahead[lo:].sum() < SHRUNK * ahead[gone:].sum():  # columns before lo have all their pairs
                right, gone = right[:, lo - gone :], lo
        i, j, c = kept[0][row[on]], kept[1][column[on]], together.data[on]
        if within:
            i, j = np.minimum(i, j), np.maximum(i, j)
        value = npmi(c, size[0][i], size[1][j], n)
        for side, (mine, its) in enumerate(((i, j), (j, i))):
            _raise_to(closeness[side], partner[side], mine, its, value)
        if not within:
            own[i[i == j]] = value[i == j]
        best = [np.concatenate([old, v]) for old, v in zip(best, (i, j, c, value), strict=True)]
        if len(best[0]) > 4 * pairs:
            best = _top(best, pairs)
    a, b, both, value = _top(best, pairs)
    return Correlations(a, b, both.astype(int), value, size, tuple(partner), tuple(closeness), own, n, least)


def _raise_to(close: np.ndarray, partner: np.ndarray, mine: np.ndarray, its: np.ndarray, value: np.ndarray) -> None:
    """Write the closest partner of each latent where it is closer than the one that is known, or as close and first."""
    order = np.lexsort((its, -value, mine))
    first = order[np.unique(mine[order], return_index=True)[1]]
    known, here = close[mine[first]], value[first]
    first = first[(here > known) | ((here == known) & (its[first] < partner[mine[first]]))]
    close[mine[first]], partner[mine[first]] = value[first], its[first]


def _top(columns: list[np.ndarray], most: int) -> list[np.ndarray]:
    a, b, _, value = columns
    order = np.lexsort((b, a, -value))[:most]
    return [c[order] for c in columns]


def alike(one: str, other: str) -> float | None:
    """How alike two names are, in [0, 1]: the Dice coefficient of their letters in threes, so that "dog" and "dogs"
    are; None where one is empty.
    """
    if not one or not other:
        return None
    first, second = (Counter(f"  {w} "[i : i + 3] for w in name.casefold().split() for i in range(len(w) + 1))
                     for name in (one, other))  # fmt: skip
    return 2 * sum((first & second).values()) / (sum(first.values()) + sum(second.values()))


def surprising(rows: list[dict[str, Any]], similar: float, across: bool) -> list[dict[str, Any]]:
    """Pairs whose names do not say that they go together, of those whose names are known; all others where none is."""
    rows = [r for r in rows if not (across and r["a"] == r["b"])]
    named = [r for r in rows if r["alike"] is not None]
    return [r for r in named if r["alike"] < similar] if named else rows
