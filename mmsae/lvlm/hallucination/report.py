"""Tables and figures of hallucination measures: every method beside its controls."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmsae.report.tables import text_table

POPE_COLUMNS = ("accuracy", "precision", "recall", "f1", "yes_ratio", "unparsed", "n")
Pope = Mapping[str, Mapping[str, Mapping[str, Mapping[str, float]]]]  # strategy, method, parser, figure
CHAIR_COLUMNS = ("chair_s", "chair_i", "recall", "length", "mentions", "n")


def pope_table(table: Pope, parser: str) -> str:
    """``table[strategy][method][parser]`` as text, for one parser."""
    rows = [[s, m, *(p[parser][c] for c in POPE_COLUMNS)] for s, own in table.items() for m, p in own.items()]
    return text_table(rows, ["questions", "method", *POPE_COLUMNS])


def chair_table(table: Mapping[str, Mapping[str, float]]) -> str:
    """``table[method]`` as text."""
    return text_table([[m, *(f[c] for c in CHAIR_COLUMNS)] for m, f in table.items()], ["method", *CHAIR_COLUMNS])


def plot_pope(table: Pope, path: str | Path, parser: str) -> Path:
    """F1 and accuracy by kind of question and method."""
    names = ("f1", "accuracy")
    groups = {n: {s: {m: p[parser][n] for m, p in own.items()} for s, own in table.items()} for n in names}
    return _bars(groups, path, f"POPE, {parser} parser (higher is better)", (0, 1))


def plot_chair(table: Mapping[str, Mapping[str, float]], path: str | Path) -> Path:
    """Hallucinated captions and mentions, with recall and length beside them: short captions win for free."""
    shares = {c: {m: f[c] for m, f in table.items()} for c in ("chair_s", "chair_i", "recall")}
    words = {"length": {m: f["length"] for m, f in table.items()}}
    groups = {"share of captions or mentions": shares, "words": words}
    return _bars(groups, path, "CHAIR (lower is better), recall and caption length")


def _bars(
    groups: Mapping[str, Mapping[str, Mapping[str, float]]], path: str | Path, title: str, ylim: Any = None
) -> Path:
    """One panel per group; in it one cluster of bars per key, one bar per method."""
    from matplotlib.figure import Figure

    from mmsae.report.figures import PALETTE, write_png

    figure = Figure(figsize=(4.2 * len(groups), 3.4), layout="constrained")
    axes = figure.subplots(1, len(groups), squeeze=False)[0]
    for axis, (name, clusters) in zip(axes, groups.items(), strict=True):
        methods = list(dict.fromkeys(m for c in clusters.values() for m in c))
        for j, method in enumerate(methods):
            x = [i + (j - (len(methods) - 1) / 2) * 0.8 / len(methods) for i in range(len(clusters))]
            values = [c.get(method, float("nan")) for c in clusters.values()]
            axis.bar(x, values, 0.75 / len(methods), label=method, color=PALETTE[j % len(PALETTE)])
        axis.set_xticks(range(len(clusters)), list(clusters))
        axis.set_ylabel(name)
        if ylim:
            axis.set_ylim(*ylim)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.suptitle(title, fontsize=10)
    return write_png(figure, path)
