"""What zero-shot classification writes: figures, a table and a chart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmsae.evaluation.rows import write_results
from mmsae.evaluation.zeroshot.head import Accuracies
from mmsae.files import atomic_file
from mmsae.metrics.statistics import whiskers
from mmsae.report.tables import markdown_table, text_table


def write_zeroshot(
    out: str, rows: list[dict[str, Any]], main: Accuracies, names: Sequence[str], about: Mapping[str, Any], say: bool
) -> Path:
    """``results.json``, ``table.md`` and ``zeroshot.png``; returns the folder."""
    folder, warnings = Path(out), about["warnings"]
    per_class = {
        kind: {name: None if v != v else v for name, v in zip(names, values.tolist(), strict=True)}
        for kind, values in main.per_class.items()
    }
    counts = dict(zip(names, main.counts.tolist(), strict=True))
    write_results(folder, rows, {**about, "per_class": per_class, "images_per_class": counts})
    with atomic_file(folder / "table.md") as temp:
        temp.write_text(markdown(rows, main.alpha, warnings))
    plot(rows, main, folder / "zeroshot.png", about["chance"])
    if say:
        shown = [[r["features"], r["control"] or "-", r["score"], r["value"], r.get("low"), r.get("high"), r["n"]]
                 for r in rows]  # fmt: skip
        for warning in warnings:
            print(f"warning: {warning}")
        print(text_table(shown, ["features", "control", "score", "value", "low", "high", "n"]))
    return folder


def markdown(rows: list[dict[str, Any]], alpha: float | None, warnings: list[str]) -> str:
    """One line per kind of features and control, intervals in brackets."""
    table = []
    for control, kind in dict.fromkeys((r["control"], r["features"]) for r in rows if "low" in r):
        own = {r["score"]: r for r in rows if (r["control"], r["features"]) == (control, kind) and "low" in r}
        cells = [
            f"{own[s]['value']:.3f} ({own[s]['low']:.3f}–{own[s]['high']:.3f})" for s in ("top1", "top5", "balanced")
        ]
        table.append([kind, control or None, *cells, own["top1"]["n"]])
    lines = [markdown_table(["features", "control", "top-1", "top-5", "mean per class", "n"], table)]
    for r in rows:
        if r["score"] == "explained_variance" and r["value"] is not None:
            lines += ["", f"Explained variance ({r['control'] or 'the SAE'}): {r['value']:.3f}"]
    if alpha is not None:
        lines += ["", f"alpha = {alpha:g}, chosen on the tuning split"]
    return "\n".join([*lines, *(["", *(f"- {w}" for w in warnings)] if warnings else [])]) + "\n"


def plot(rows: list[dict[str, Any]], main: Accuracies, path: Path, chance: float) -> None:
    """Top-1 with intervals, trained and random; and top-1 on the tuning split against alpha."""
    from matplotlib.figure import Figure

    from mmsae.report.figures import GREY, PALETTE, write_png

    figure = Figure(figsize=(8.4, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    kinds = list(main.per_class)
    for j, (control, colour) in enumerate((("", PALETTE[0]), ("random", GREY))):
        own = {r["features"]: r for r in rows if r["score"] == "top1" and r["control"] == control}
        for i, kind in enumerate(kinds):
            if r := own.get(kind):
                error = whiskers(r["value"], r["low"], r["high"])
                left.bar(i + 0.4 * j - 0.2, r["value"], 0.36, yerr=[[e] for e in error], color=colour, capsize=2,
                         label=(control or "SAE") if i == 0 else None)  # fmt: skip
    left.axhline(chance, color=GREY, lw=0.8, ls=":", label="chance")
    left.set_xticks(range(len(kinds)), kinds)
    left.set(ylabel="top-1, 95% interval", ylim=(0, 1))
    left.legend(frameon=False, fontsize=8)
    if main.tuning:
        right.plot(list(main.tuning), list(main.tuning.values()), "o-", color=PALETTE[1], ms=4)
        right.axvline(main.alpha, color=GREY, lw=0.8, ls=":")
        right.set(xlabel="alpha", ylabel="top-1 on the tuning split")
    else:
        right.set_axis_off()
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    write_png(figure, path)
