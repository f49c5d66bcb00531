"""Settings that were chosen from a grid: was the chosen one an end of it, so that a better one may lie beyond?"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence

from mmsae.errors import Warned


def at_edge(what: str, chosen: float, grid: Iterable[float], natural: Sequence[float] = ()) -> list[str]:
    """``["what: chosen (of smallest to largest)"]`` where the chosen setting is an end of its grid, else nothing.

    Of one setting nothing was chosen. ``natural`` are ends beyond which there is nothing to try, such as a weight of 0;
    these are not said.
    """
    tried = sorted(set(grid))
    if len(tried) < 2 or chosen in natural or chosen not in (tried[0], tried[-1]):
        return []
    return [f"{what} {chosen:g} (of {tried[0]:g} to {tried[-1]:g})"]


def edge_warning(edges: Sequence[str]) -> list[str]:
    """One warning about all settings that :func:`at_edge` found, or none."""
    said = "chosen at the end of what was tried, where a better setting may lie beyond: "
    return [said + "; ".join(edges)] if edges else []


def warn_at_edge(tried: Sequence[Mapping[str, float]], best: Mapping[str, float], fields: Sequence[str]) -> None:
    """A ``UserWarning`` where some fields of the best of all tried settings are an end of what was tried."""
    edges = [e for f in fields for e in at_edge(f, best[f], [s[f] for s in tried])]
    for said in edge_warning(edges):
        warnings.warn(said, Warned, stacklevel=3)
