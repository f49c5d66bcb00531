"""Figures of several seeds as one row."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def over_seeds(runs: Sequence[dict[str, float]]) -> dict[str, float]:
    """Means over seeds, and sample deviations as ``NAME_sd`` where there are several."""
    out = {name: statistics.fmean(r[name] for r in runs) for name in runs[0]}
    if len(runs) > 1:
        out |= {f"{name}_sd": statistics.stdev(r[name] for r in runs) for name in runs[0]}
    return out
