"""Figures of a sweep: before and after in a grid, and the dose response with its controls."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from torch import Tensor

from mmsae.metrics.statistics import interval
from mmsae.report.figures import PALETTE
from mmsae.steering.measure.sweep import UNSTEERED, Images, rows_of

if TYPE_CHECKING:
    import pandas as pd

_TINY = 64  # pixels: smaller images keep their pixels when they are enlarged


def grid(
    rows: Sequence[tuple[str, Sequence[Tensor | None]]], columns: Sequence[str], title: str = "", size: float = 1.15
) -> Figure:
    """Images side by side.

    ``rows`` are ``(label, images (3, H, W) in [0, 1] or None)``, the label a prompt, as a rule; ``size`` is in inches
    of an image.
    """
    figure = Figure(figsize=(1.6 + size * len(columns), 0.5 + (size + 0.08) * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), len(columns), squeeze=False)
    for line, (label, images) in zip(axes, rows, strict=True):
        for axis, image in zip(line, images, strict=True):
            axis.set_xticks([])
            axis.set_yticks([])
            axis.spines[:].set_visible(False)
            if image is not None:
                how = "nearest" if image.shape[-1] < _TINY else "antialiased"
                axis.imshow(image.permute(1, 2, 0).clamp(0, 1).numpy(), interpolation=how)
        text = textwrap.fill(label, 20)
        line[0].set_ylabel(text, fontsize=7, rotation=0, ha="right", va="center", labelpad=6)
    for axis, heading in zip(axes[0], columns, strict=True):
        axis.set_title(heading, fontsize=8)
    if title:
        figure.suptitle(title, fontsize=10)
    return figure


def dose_plot(table: pd.DataFrame, metrics: Sequence[str], title: str = "") -> Figure:
    """Mean of metrics over the strength, with intervals over prompts; controls as a band from lowest to highest."""
    figure = Figure(figsize=(1.2 + 3.2 * len(metrics), 3.1), layout="constrained")
    for axis, metric in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True):
        own = rows_of(table, metric)
        base = own[own.intervention == UNSTEERED]
        names = [n for n in own.intervention.unique() if n != UNSTEERED]
        for colour, name in zip(PALETTE * (len(names) // len(PALETTE) + 1), names, strict=False):
            mine = own[own.intervention == name]
            _curve(axis, mine[mine.control < 0], base, name, colour)
            _band(axis, mine[mine.control >= 0], base, colour)
        axis.set_xlabel("strength")
        axis.set_ylabel(metric)
        axis.spines[["top", "right"]].set_visible(False)
    handles = {h.get_label(): h for a in figure.axes for h in a.get_lines() if not h.get_label().startswith("_")}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    if title:
        figure.suptitle(title, fontsize=10)
    return figure


def _curve(axis: Any, mine: pd.DataFrame, base: pd.DataFrame, name: str, colour: str) -> None:
    levels = {0.0: base} | {s: mine[mine.strength == s] for s in mine.strength.unique()}
    found = {s: interval(rows.value.to_numpy(), rows.prompt.to_numpy()) for s, rows in sorted(levels.items())}
    x = list(found)
    axis.plot(x, [i.mean for i in found.values()], "o-", ms=3, lw=1.5, color=colour, label=name)
    axis.fill_between(
        x, [i.low for i in found.values()], [i.high for i in found.values()], color=colour, alpha=0.18, lw=0
    )


def _band(axis: Any, controls: pd.DataFrame, base: pd.DataFrame, colour: str) -> None:
    if not len(controls):
        return
    means = controls.groupby(["strength", "control"]).value.mean().groupby("strength").agg(["min", "mean", "max"])
    means.loc[0.0] = base.value.mean()
    means = means.sort_index()
    axis.plot(means.index, means["mean"], "--", lw=1, color=colour, label="random features (lowest to highest)")
    axis.fill_between(means.index, means["min"], means["max"], facecolor="#888888", alpha=0.2, lw=0)


def before_after(kept: Images, name: str, title: str = "") -> Figure:
    """Unsteered images, an intervention at its strengths, and two controls at their largest strength."""
    strengths = sorted({s for n, s, c in kept if n == name and c < 0}, key=lambda s: (abs(s), s))
    columns = {"before": kept[UNSTEERED, 0.0, -1]} | {f"{s:g}": kept[name, s, -1] for s in strengths}
    top = max((s for n, s, c in kept if n == name and c >= 0), key=abs, default=0.0)
    first = [c for n, s, c in kept if n == name and s == top and c >= 0][:2]
    columns |= {f"random {c} at {top:g}": kept[name, top, c] for c in first}
    items = list(columns["before"])
    seeds = len({i.prompt for i in items}) < len(items)
    label = lambda i: f"{i.prompt} (seed {i.seed})" if seeds else i.prompt  # noqa: E731
    rows = [(label(i), [own.get(i) for own in columns.values()]) for i in items]
    return grid(rows, list(columns), title or name)
