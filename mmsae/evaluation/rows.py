"""The row that every head reports: one figure with what it was measured on, and its control."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmsae.files import write_json

COLUMNS = ("head", "set", "score", "features", "value", "low", "high", "n", "control")
TRAINED = ""  # the control of a row that is none


def row(
    head: str,
    set: str,
    score: str,
    features: str,
    value: float,
    n: int,
    control: str = TRAINED,
    interval: tuple[float, float] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """One figure: ``value`` (NaN where it does not exist) of a score of some features, from n samples of a set.

    ``control`` is empty for the SAE itself, else ``random``, ``pca``, ...; ``interval`` gives ``low`` and ``high``.
    """
    value = float(value)
    value = None if math.isnan(value) else value
    ends = {} if interval is None else {"low": interval[0], "high": interval[1]}
    return {"head": head, "set": set, "score": score, "features": features, "value": value, "n": int(n),
            "control": control, **ends, **more}  # fmt: skip


def find(rows: Sequence[Mapping[str, Any]], **fields: Any) -> list[Mapping[str, Any]]:
    """The rows whose fields have these values."""
    return [r for r in rows if all(r.get(k) == v for k, v in fields.items())]


def write_results(folder: str | Path, rows: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> Path:
    """``results.json``: what was run, and the rows. Returns its path."""
    return write_json(Path(folder) / "results.json", {**about, "rows": list(rows)}, indent=1)
