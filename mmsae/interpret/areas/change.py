"""What changed between two images of one place: areas that stayed, moved, went and came, with their concepts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from mmsae.interpret.areas.areas import Areas, called
from mmsae.interpret.areas.connected import iou
from mmsae.interpret.areas.match import AreaMatch, MatchOptions, match_areas
from mmsae.types import InputError


class AreaChange(NamedTuple):
    """Areas of two images, by what became of them; numbers are places in the two :class:`~.areas.Areas`."""

    stayed: np.ndarray  #: ``(k, 2) int64`` matched, and in the same place
    moved: np.ndarray  #: ``(k, 2) int64`` matched, elsewhere
    gone: np.ndarray  #: ``(k,) int64`` only in the first
    came: np.ndarray  #: ``(k,) int64`` only in the second
    match: AreaMatch

    def about(
        self, first: Areas, second: Areas, names: Mapping[int, str] | None = None, most: int = 3
    ) -> dict[str, Any]:
        """Plain values: of matched areas what differs in their codes, of others the latents that they are made of."""
        one, two = first.about(names, most), second.about(names, most)

        def pairs(which: np.ndarray) -> list[dict[str, Any]]:
            said = []
            for i, j in which.tolist():
                less, more = altered(first, i, second, j, names, most)
                alike = float(self.match.similarity[i, j])
                said.append({"from": one[i], "to": two[j], "similarity": alike, "less": less, "more": more})
            return said

        return {
            "stayed": pairs(self.stayed), "moved": pairs(self.moved),
            "gone": [one[i] for i in self.gone], "came": [two[j] for j in self.came],
        }  # fmt: skip


def altered(
    first: Areas, i: int, second: Areas, j: int, names: Mapping[int, str] | None = None, most: int = 3
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:  # fmt: skip
    """Latents of which area j of the second has less than area i of the first, and those of which it has more."""
    diff = (second.descriptor[j].astype(np.float64) - first.descriptor[i].astype(np.float64)).tocsr()
    order = np.argsort(-np.abs(diff.data), kind="stable")
    said = [{**called(diff.indices[k], names), "by": float(diff.data[k])} for k in order if abs(diff.data[k]) > 1e-6]
    return [s for s in said if s["by"] < 0][:most], [s for s in said if s["by"] > 0][:most]


def what_changed(
    first: Areas, second: Areas, options: MatchOptions = MatchOptions(), same_place: float = 0.5
) -> AreaChange:  # fmt: skip
    """Compare the areas of two images of equal grid.

    Args:
        first: Of the earlier one, say.
        second: Of the later one.
        options: How areas are matched.
        same_place: Intersection over union from which on a matched area stayed where it was.

    Raises:
        InputError: Grids of different shape.
    """
    if first.shape != second.shape:
        raise InputError(
            f"areas of two images are compared on one grid, and theirs are {first.shape} and {second.shape}"
        )
    match = match_areas(first, second, options)
    at = iou(first.masks, second.masks)[match.pairs[:, 0], match.pairs[:, 1]]
    alone = (np.setdiff1d(np.arange(a.n), match.pairs[:, k]) for k, a in enumerate((first, second)))
    return AreaChange(match.pairs[at >= same_place], match.pairs[at < same_place], *alone, match)
