"""Curves of training runs, from their CSV logs."""

from __future__ import annotations

import csv
from pathlib import Path


def read_curves(run: Path) -> dict[str, tuple[list[float], list[float]]]:
    """``{column: (steps, values)}`` of all CSV logs of a run, in order of steps; a resumed run has several files."""
    columns: dict[str, dict[int, float]] = {}
    for file in sorted(run.glob("logs/version_*/metrics.csv")):
        with file.open(newline="") as handle:
            for row in csv.DictReader(handle):
                for name, value in row.items():
                    if value and name not in ("step", "epoch"):
                        columns.setdefault(name, {})[int(row["step"])] = float(value)
    return {name: tuple(map(list, zip(*sorted(points.items()), strict=True))) for name, points in columns.items()}


def last_validation(run: Path) -> dict[str, float]:
    """``{fvu/image: ...}`` of the last validation of a run."""
    return {k.removeprefix("val/"): v[-1] for k, (_, v) in read_curves(run).items() if k.startswith("val/")}
