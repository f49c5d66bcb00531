"""What an SAE over pairs should reach, place by place; set before any figure of this benchmark."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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


def reached(
    tables: Mapping[str, Mapping[str, Mapping[str, float]]], names: Sequence[str]
) -> tuple[list[str], list[list[str]]]:
    """Header and rows: what each SAE has at every place that was run, and whether that reaches the goal."""

    def cell(goal: Goal, row: Mapping[str, float] | None) -> str:
        if row is None:
            return ""
        value = goal.value(row)
        good = value <= goal.bound if goal.at_most else value >= goal.bound
        return f"{value:.3f}" if good else f"{value:.3f}: no"

    rows = [
        [place, goal.text, f"{'≤' if goal.at_most else '≥'} {goal.bound:g}", *(cell(goal, table.get(n)) for n in names)]
        for place, goals in GOALS.items()
        if (table := tables.get(place))
        for goal in goals
    ]
    return ["where", "figure", "goal", *names], rows
