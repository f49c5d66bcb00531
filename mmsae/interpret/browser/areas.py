"""How many areas latents have in the items that a browser shows, for ``count`` of its queries."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from mmsae.interpret.areas.patches import evidence_entries
from mmsae.interpret.areas.relations import CorpusAreas
from mmsae.interpret.browser.files import indices, packed
from mmsae.types import IMAGE

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

    from mmsae.interpret.evidence.folder import Evidence

ENTRIES = 2e7  # of patch codes in memory at a time


class ShownAreas:
    """Numbers of areas in the shown items, by the rules of :class:`~mmsae.interpret.areas.relations.CorpusAreas`.

    Args:
        evidence: With a patch grid.
        number: ``(n,)`` the number of each item of the evidence among the shown ones, -1 where it is not shown.
        names: Names of latents; areas that latents of one name make together are counted, too.

    Attributes:
        single: ``(d_sae, m)`` areas of every latent in every shown item.
        together: Areas of latents that have one name, by these latents.
    """

    def __init__(self, evidence: Evidence, number: np.ndarray, names: Mapping[int, str]):
        from scipy.sparse import csr_matrix

        grid, table, m = evidence.grid(IMAGE), evidence.all_tokens(IMAGE), int(number.max(initial=-1)) + 1
        groups = same_name(names)
        found: list[tuple[np.ndarray, ...]] = []
        common: dict[tuple[int, ...], np.ndarray] = {g: np.zeros(m, np.int32) for g in groups}
        for rows in _blocks(table.start, ENTRIES):
            item, *entries = evidence_entries(evidence, IMAGE, rows=rows)
            shown = number[item] >= 0
            item, *entries = (x[shown] for x in (number[item], *entries))
            areas = CorpusAreas(item, *entries, m, (grid.rows, grid.cols))
            found.append(areas.counts())
            for group in groups:
                common[group] += areas.count(group).astype(np.int32)
        latent, item, count = (
            (np.concatenate(x) for x in zip(*found, strict=True)) if found else (np.zeros(0, int),) * 3
        )
        self.single: csr_matrix = csr_matrix((count, (latent, item)), shape=(evidence.d_sae, m))
        self.single.sort_indices()
        self.together = common

    def of(self, rows: slice) -> dict[str, Any]:
        """``start``, ``item`` and ``count`` of the latents of a shard."""
        part = self.single[rows]
        return {"start": packed(part.indptr, "i4"), **_counted(part.indices, part.data, self.single.shape[1])}

    def names(self) -> dict[str, Any]:
        """``item`` and ``count`` of latents of one name, by their numbers in a row with commas."""
        return {
            ",".join(map(str, group)): _counted(np.flatnonzero(count), count[count > 0], len(count))
            for group, count in self.together.items()
        }


def same_name(names: Mapping[int, str]) -> list[tuple[int, ...]]:
    """Latents that have the same name, whatever the case of its letters; only where there are several."""
    by: dict[str, list[int]] = {}
    for j, name in sorted(names.items()):
        by.setdefault(name.casefold(), []).append(j)
    return [tuple(group) for group in by.values() if len(group) > 1]


def _counted(item: np.ndarray, count: np.ndarray, m: int) -> dict[str, Any]:
    return {"item": indices(item, m), "count": packed(count, "u1" if count.max(initial=0) < 256 else "u2")}


def _blocks(start: Sequence[int] | np.ndarray, most: float) -> Iterable[slice]:
    """Rows of a table in blocks of about ``most`` entries."""
    start = np.asarray(start, np.int64)
    if not len(start) > 1:
        return []
    cuts = np.searchsorted(start, np.arange(0, start[-1], most), "left")
    ends = np.unique(np.append(cuts, len(start) - 1))
    return [slice(int(a), int(b)) for a, b in pairwise(ends)]
