"""The row that every head reports: one figure with what it was measured on, and its control."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmsae.files import atomic_file

COLUMNS = ("head", "set", "score", "features", "value", "low", "high", "n", "control")
TRAINED = ""  # the control of a row that is none


def row(
    head: str, set: str, score: str, features: str, value: float, n: int, control: str = TRAINED, **more: Any
) -> dict[str, Any]:
    """One figure.

    Args:
        head: ``zeroshot``, ``ood``, ...
        set: What it was measured on.
        score: What was measured.
        features: ``raw``, ``code``, ``recon``, ``resid``, ...
        value: The figure; NaN where it does not exist.
        n: Number of samples behind it.
        control: Empty for the SAE itself, else which control: ``random``, ``pca``, ``statistics``, ...
        **more: Further fields, e.g. ``low`` and ``high`` of an interval.
    """
    value = float(value)
    value = None if math.isnan(value) else value
    return {"head": head, "set": set, "score": score, "features": features, "value": value, "n": int(n),
            "control": control, **more}  # fmt: skip


def find(rows: Sequence[Mapping[str, Any]], **fields: Any) -> list[Mapping[str, Any]]:
    """The rows whose fields have these values."""
    return [r for r in rows if all(r.get(k) == v for k, v in fields.items())]


def wilson(hits: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """95% interval of a share by Wilson's score (E. B. Wilson, JASA 1927); ``(nan, nan)`` of nothing.

    It lies in [0, 1] and holds the share to the bit: by rounding alone that of n of n would often end below 1.
    """
    if not n:
        return math.nan, math.nan
    p, s = hits / n, z * z / n
    centre, half = p + s / 2, z * math.sqrt(p * (1 - p) / n + s / (4 * n))
    return max(0.0, min(p, (centre - half) / (1 + s))), min(1.0, max(p, (centre + half) / (1 + s)))


def write_results(folder: str | Path, rows: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> Path:
    """``results.json``: what was run, and the rows. Returns its path."""
    path = Path(folder) / "results.json"
    with atomic_file(path) as temp:
        temp.write_text(json.dumps({**about, "rows": list(rows)}, indent=1, ensure_ascii=False) + "\n")
    return path


def text_table(rows: Sequence[Sequence[Any]], header: Sequence[str]) -> str:
    """Aligned columns; floats with three decimals, None as a dash."""
    show = lambda c: f"{c:.3f}" if isinstance(c, float) else "-" if c is None else str(c)  # noqa: E731
    cells = [list(map(str, header)), *([show(c) for c in r] for r in rows)]
    width = [max(len(r[i]) for r in cells) for i in range(len(header))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(r, width, strict=True)).rstrip() for r in cells)
