"""What the default for pairs should reach, place by place; set before any figure of this benchmark."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple


class Goal(NamedTuple):
    """A bound on a figure of one row."""

    text: str
    value: Callable[[Mapping[str, float]], float]
    bound: float
    at_most: bool = False


GOALS: dict[str, tuple[Goal, ...]] = {
    "world, F 128, k 8": (
        Goal("FVU image", lambda r: r["fvu_image"], 0.045, True),
        Goal("FVU text", lambda r: r["fvu_text"], 0.030, True),
        Goal("cosine of pairs minus shuffled", lambda r: r["pair"] - r["shuffled"], 0.65),
        Goal("R@1", lambda r: r["recall"], 0.945),
        Goal("R@1, share of the embeddings'", lambda r: r["recall"] / r["recall_host"], 0.98),
        Goal("F1 same", lambda r: r["f1_same"], 0.82),
        Goal("AUC same", lambda r: r["auc_same"], 0.90),
        Goal("agreement", lambda r: r["agreement"], 0.80),
        Goal("bimodal energy", lambda r: r["bimodal_energy"], 0.98),
        Goal("wrong caption, weighted", lambda r: r["wrong_weighted"], 0.985),
        Goal("wrong caption, below the host's cosine", lambda r: r["wrong_host"] - r["wrong_weighted"], 0.01, True),
        Goal("dead", lambda r: r["dead"], 0.45, True),
    ),
    "world, F 48, k 6": (
        Goal("F1 same", lambda r: r["f1_same"], 0.79),
        Goal("AUC same", lambda r: r["auc_same"], 0.88),
        Goal("R@1", lambda r: r["recall"], 0.91),
    ),
    "uncentred, F 128, k 8": (Goal("R@1", lambda r: r["recall"], 0.94),),
    "noisy host, F 128, k 8": (
        Goal("wrong caption, weighted", lambda r: r["wrong_weighted"], 0.925),
        Goal("wrong caption, above the host's cosine", lambda r: r["wrong_weighted"] - r["wrong_host"], 0.0),
    ),
    "photographs, F 48, k 4": (
        Goal("zero-shot from codes, share of the host's", lambda r: r["zero_shot"] / r["zero_shot_host"], 0.95),
    ),
}


def reached(tables: Mapping[str, Mapping[str, Mapping[str, float]]], name: str | None) -> list[tuple[str, ...]]:
    """``(place, figure, goal, value, yes or no)`` of one SAE, at the places that were run with it."""
    out = []
    for place, goals in GOALS.items():
        row = tables.get(place, {}).get(name or "")
        for goal in goals if row is not None else ():
            value = goal.value(row)
            good = value <= goal.bound if goal.at_most else value >= goal.bound
            sign = "≤" if goal.at_most else "≥"
            out.append((place, goal.text, f"{sign} {goal.bound:g}", f"{value:.3f}", "yes" if good else "no"))
    return out
