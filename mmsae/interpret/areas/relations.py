"""Counts of areas and their relations over a corpus: what ``count``, ``left_of`` and ``overlap`` of queries ask for."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from mmsae.interpret.areas.connected import CELLS, ConnectedAreas, connected_areas
from mmsae.interpret.areas.patches import AreaLatents, AreaOptions, evidence_entries
from mmsae.types import IMAGE, InputError

if TYPE_CHECKING:
    from mmsae.interpret.evidence.folder import Evidence

NEAR = 0.5  # patches: areas whose centres differ by less are on one vertical


class CorpusAreas:
    """Areas of latents in the items of a corpus; a :class:`~mmsae.metrics.concepts.query.AreaMeasures`.

    Only items whose patches are known have areas (:attr:`known`); others have none, so that queries over areas find
    items in evidence only. A latent makes areas wherever it fires, whatever its percentile: a query has its own
    comparisons. Latents that stand for one name make common areas.

    Args:
        item: ``(m,)`` item of each entry of the patch codes.
        latent: ``(m,)`` its latent.
        place: ``(m,)`` its patch, ``row * cols + column``.
        value: ``(m,)`` its value, above 0.
        n: Number of items.
        grid: Rows and columns.
        options: How areas are made; ``percentile``, ``merge``, ``dense`` and ``fixed`` do not count.
        known: ``(n,) bool`` items whose patches are known; default: all.

    Raises:
        InputError: There is no grid.
    """

    def __init__(
        self, item: np.ndarray, latent: np.ndarray, place: np.ndarray, value: np.ndarray, n: int, grid: tuple[int, int],
        options: AreaOptions = AreaOptions(), known: np.ndarray | None = None,
    ):  # fmt: skip
        if not grid[0]:
            raise InputError("areas need codes of patches, and these are of a site without a patch grid")
        order = np.argsort(latent, kind="stable")
        self._item, self._place, self._value = item[order], place[order], value[order]
        self._latent = latent[order]
        self.n, self.grid, self.options = n, grid, options
        self.known = np.ones(n, bool) if known is None else known
        self._areas = lru_cache(maxsize=64)(self._make)

    @classmethod
    def of_evidence(
        cls, evidence: Evidence, options: AreaOptions = AreaOptions(), modality: str = IMAGE
    ) -> CorpusAreas:
        """Those of the items in evidence."""
        grid, known = evidence.grid(modality), np.zeros(evidence.n, bool)
        known[evidence.all_tokens(modality).items] = True
        return cls(*evidence_entries(evidence, modality), evidence.n, (grid.rows, grid.cols), options, known)

    def areas(self, latents: Sequence[int]) -> tuple[np.ndarray, ConnectedAreas]:
        """Items ``(A,)`` of the areas that some latents make together, and the areas; by item."""
        return self._areas(tuple(sorted(set(latents))))

    def _entries(self, latents: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Places of the entries of some latents, and which of the latents each is of."""
        bounds = [np.searchsorted(self._latent, (j, j + 1)) for j in latents]
        at = np.concatenate([np.arange(lo, hi) for lo, hi in bounds] or [np.zeros(0, int)])
        return at, np.repeat(np.arange(len(latents)), [hi - lo for lo, hi in bounds])

    def _make(self, latents: tuple[int, ...]) -> tuple[np.ndarray, ConnectedAreas]:
        return self._found(*self._entries(latents), self._item)

    def _found(self, at: np.ndarray, which: np.ndarray, layers: np.ndarray) -> tuple[np.ndarray, ConnectedAreas]:
        """The areas of maps that are made of entries ``at``: those of one number in ``layers`` (of all entries) are one
        map, in which each latent (``which``) counts by its own maximum. Returns the number of each area, too.
        """
        (rows, cols), o = self.grid, self.options
        if 1 - (0.5 + 0.5 / o.upsample) ** 2 < o.level * 0.999:  # then areas lie in patches that fire
            _, owner, size = np.unique(layers[at], return_inverse=True, return_counts=True)
            enough = size[owner] >= o.least_patches
            at, which = at[enough], which[enough]
        numbers, layer = np.unique(layers[at], return_inverse=True)
        value = np.asarray(self._value[at], np.float32)
        # each latent's map is measured by its own maximum in the image, so that a large one does not hide a small one
        key = layer * (int(which.max(initial=0)) + 1) + which
        top = np.zeros(int(key.max(initial=-1)) + 1, np.float32)
        np.maximum.at(top, key, value)
        out, parts = [], max(1, CELLS // (rows * cols * o.upsample**2))
        order = np.argsort(layer, kind="stable")
        layer, place, share = layer[order], self._place[at][order], (value / top[key])[order]
        for lo in range(0, len(numbers), parts):
            a, b = np.searchsorted(layer, (lo, lo + parts))
            maps = np.zeros((min(parts, len(numbers) - lo), rows * cols), np.float32)
            np.maximum.at(maps, (layer[a:b] - lo, place[a:b]), share[a:b])
            out.append(connected_areas(maps.reshape(-1, rows, cols), o.upsample, o.level, o.least_patches))
        if not out:
            out = [connected_areas(np.zeros((0, rows, cols), np.float32), o.upsample)]
        found = _joined(out, parts)
        return numbers[found.layer], found

    def counts(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Latent, item and number of areas where a latent by itself has any: :meth:`count` of all latents at once."""
        each = self._latent.astype(np.int64) * self.n + self._item
        found, _ = self._found(np.arange(len(each)), np.zeros(len(each), int), each)
        pair, count = np.unique(found, return_counts=True)
        return pair // self.n, pair % self.n, count

    def count(self, latents: Sequence[int]) -> np.ndarray:
        """``(n,) float64`` number of areas in each item."""
        return np.bincount(self.areas(latents)[0], minlength=self.n).astype(float)

    def signed_left(self, a: Sequence[int], b: Sequence[int]) -> np.ndarray:
        """``(n,)`` in [-1, 1]: of all pairs of an area of a and one of b, by mass, the share in which the first lies
        left of the second, less the share in which it lies right of it; 0 where one is missing.

        Exchanging a and b, or mirroring the image, changes the sign; shifting all areas changes nothing.
        """
        (item_a, first), (item_b, second) = self.areas(a), self.areas(b)
        i, j = _same(item_a, item_b, self.n)
        weight = first.mass[i].astype(float) * second.mass[j]
        apart = second.centre[j, 0].astype(float) - first.centre[i, 0]
        near = NEAR / self.grid[1] * (1 - 1e-4)
        sign = np.where(np.abs(apart) < near, 0, np.sign(apart))
        total = np.bincount(item_a[i], weight, self.n)
        return np.bincount(item_a[i], weight * sign, self.n) / np.where(total, total, 1)

    def left_of(self, a: Sequence[int], b: Sequence[int]) -> np.ndarray:
        """``(n,)`` in [0, 1]: how far areas of a lie left of areas of b; see :meth:`signed_left`."""
        return self.signed_left(a, b).clip(0)

    def overlap(self, a: Sequence[int], b: Sequence[int]) -> np.ndarray:
        """``(n,)`` in [0, 1]: the largest share of the smaller of an area of a and one of b that both cover."""
        (item_a, first), (item_b, second) = self.areas(a), self.areas(b)
        i, j = _same(item_a, item_b, self.n)
        shared = np.asarray(first.masks[i].multiply(second.masks[j]).sum(1), float).ravel()
        size = np.minimum(np.diff(first.masks.indptr)[i], np.diff(second.masks.indptr)[j])
        out = np.zeros(self.n)
        np.maximum.at(out, item_a[i], shared / np.maximum(size, 1))
        return out

    def usable(self, latents: AreaLatents) -> np.ndarray:
        """Latents that may make areas and do so somewhere."""
        return np.intersect1d(np.flatnonzero(latents.usable), np.unique(self._latent))


def _joined(parts: list[ConnectedAreas], step: int) -> ConnectedAreas:
    from scipy.sparse import vstack

    if len(parts) == 1:
        return parts[0]
    plain = {k: np.concatenate([getattr(p, k) for p in parts]) for k in ("size", "mass", "box", "centre")}
    layer = np.concatenate([p.layer + i * step for i, p in enumerate(parts)])
    return ConnectedAreas(layer=layer, masks=vstack([p.masks for p in parts]).tocsr(), shape=parts[0].shape, **plain)


def _same(item_a: np.ndarray, item_b: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """All pairs ``(i, j)`` of places in two ascending lists of items that hold the same item."""
    start = np.searchsorted(item_b, np.arange(n + 1))
    length = (start[1:] - start[:-1])[item_a]
    i = np.repeat(np.arange(len(item_a)), length)
    j = np.arange(len(i)) - np.repeat(np.cumsum(length) - length, length) + np.repeat(start[:-1][item_a], length)
    return i, j
