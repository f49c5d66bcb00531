"""Charts as inline SVG that takes the page's font and text colour, so that one file reads well in light and dark."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup, escape
from matplotlib import rc_context
from matplotlib.figure import Figure as MplFigure

from mmsae.files import atomic_file

INK = "#010203"  # stands for "the colour of the text" until the SVG is written
GREY = "#888888"  # of lines to compare with
PALETTE = ("#3b82f6", "#f97316", "#10b981", "#a855f7", "#ef4444", "#64748b", "#eab308", "#06b6d4")
STYLE = {
    "svg.fonttype": "none",
    "font.size": 10.5,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#8888884d",
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}


class Figure(NamedTuple):
    """A figure in a report."""

    html: Markup  #: Inline SVG or an ``<img>`` with a data URI
    caption: str = ""  #: Shown below it


@contextmanager
def canvas(columns: int = 1, rows: int = 1, width: float = 7.2, height: float = 3.2, **kwargs):
    """``(figure, axes)`` in the report's style; ``axes`` is an array when there are several."""
    with rc_context(STYLE):
        fig = MplFigure(figsize=(width, height), layout="constrained")
        yield fig, fig.subplots(rows, columns, **kwargs)


def inline_svg(fig: MplFigure, alt: str) -> Markup:
    """A matplotlib figure as responsive inline SVG with a text alternative.

    Ids are made unique by content, since SVGs inlined in one page share their id space.
    """
    buffer = io.StringIO()
    with rc_context({**STYLE, "svg.hashsalt": "mmsae"}):
        fig.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    tag = "f" + hashlib.blake2b(svg.encode(), digest_size=4).hexdigest()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{tag}-", svg)
    svg = svg.replace(INK, "currentColor")
    # the page's font: newer matplotlib writes font-size and font-family, older a font shorthand
    svg = re.sub(r"font: [^;\"]*?([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    head, body = svg.split(">", 1)
    width = float(re.search(r'width="([\d.]+)pt"', head)[1]) * 4 / 3
    head = re.sub(r'\s(width|height)="[\d.]+pt"', "", head)
    return Markup(
        f'{head} role="img" aria-label="{escape(alt)}" style="width:100%;max-width:{width:.0f}px;height:auto">'
        f"<title>{escape(alt)}</title>{body}"
    )


def figure(fig: MplFigure, alt: str, caption: str = "") -> Figure:
    """A matplotlib figure for a report; ``alt`` says in words what it shows."""
    return Figure(inline_svg(fig, alt), caption)


def write_png(fig: MplFigure, path: str | Path, dpi: int = 120, **options: Any) -> Path:
    """Write a PNG, whole or not at all; ``options`` are those of ``savefig``."""
    with atomic_file(path) as temp:
        fig.savefig(temp, format="png", dpi=dpi, **options)
    return Path(path)


def _columns(width: float, names: Sequence[str]) -> int:
    """Columns of a legend that is no wider than a figure of ``width`` inches; entries are as wide as the longest."""
    return max(1, min(len(names), 5, int(width / (0.6 + 0.08 * max(map(len, names))))))


def line_chart(
    panels: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]],
    *,
    x_label: str,
    caption: str = "",
    log_y: bool = False,
) -> Figure:
    """Curves in panels side by side, with one legend.

    Args:
        panels: ``{panel title: {curve name: (x, y)}}``; a name has the same colour in every panel.
        x_label: Label of the x axes.
        caption: Shown below.
        log_y: Logarithmic y axes.
    """
    names = list(dict.fromkeys(name for curves in panels.values() for name in curves))
    colour = {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(names)}
    width = max(5.0, 3.6 * len(panels))
    with canvas(len(panels), width=width, height=3.1, squeeze=False) as (fig, axes):
        for ax, (title, curves) in zip(axes[0], panels.items(), strict=True):
            for name, (x, y) in curves.items():
                ax.plot(x, y, color=colour[name], label=name)
            ax.set(title=title, xlabel=x_label)
            if log_y:
                ax.set_yscale("log")
        handles = {h.get_label(): h for ax in axes[0] for h in ax.get_lines()}
        fig.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=_columns(width, names))
        return figure(fig, f"{', '.join(panels)} against {x_label} for {', '.join(names)}", caption)


def bar_chart(
    values: Mapping[str, Mapping[str, float]],
    *,
    y_label: str,
    caption: str = "",
    lines: Mapping[str, float] | None = None,
    stacked: bool = False,
) -> Figure:
    """Bars, side by side in groups or on top of each other.

    Args:
        values: ``{series: {group: value}}``; all series have the same groups.
        y_label: Label of the y axis.
        caption: Shown below.
        lines: ``{name: height}`` of dashed reference lines.
        stacked: Whether the series of a group are one bar.
    """
    groups = list(next(iter(values.values())))
    wide = 0.5 if stacked else 0.8 / len(values)
    foot = [0.0] * len(groups)
    width = max(5.0, 0.22 * len(groups) * len(values) + 2.5)
    with canvas(width=width) as (fig, ax):
        for i, (name, series) in enumerate(values.items()):
            at = [g + (0 if stacked else (i - (len(values) - 1) / 2) * wide) for g in range(len(groups))]
            heights = [series[g] for g in groups]
            ax.bar(at, heights, wide * 0.92, bottom=foot, label=name, color=PALETTE[i % len(PALETTE)])
            if stacked:
                foot = [f + h for f, h in zip(foot, heights, strict=True)]
        for name, height in (lines or {}).items():
            ax.axhline(height, ls="--", lw=1, color=INK, label=f"{name} {height:.2f}")
        ax.set_xticks(range(len(groups)), groups)
        ax.set_ylabel(y_label)
        ax.grid(axis="x", visible=False)
        fig.legend(loc="outside lower center", ncols=_columns(width, [*values, *(lines or {})]))
        return figure(fig, f"{y_label} of {', '.join(values)} by {', '.join(groups)}", caption)


def zf_plot(
    rows: Mapping[str, tuple[Sequence[float], Sequence[float]]], *, caption: str = "", points: int = 1000
) -> Figure:
    """The ZF plot (arXiv 2503.24277): norms of codes against those of rows, with the line on which both agree.

    Dashed lines are ``|f| = |x| sqrt(1 / (1 +- e))`` for e = epsilon (F - 1) of .25, .5 and 1: within them a code may
    lie whose atoms have cosines up to epsilon. Above the line a code is larger than its row, below it smaller.

    Args:
        rows: ``{series: (norms of rows, norms of codes)}``, as ``mmsae.metrics.code_norms`` gives them.
        caption: Shown below.
        points: Points of a series that are drawn, evenly spread over its rows.
    """
    rows = {name: tuple(np.asarray(side, dtype=float) for side in pair) for name, pair in rows.items()}
    end = 1.05 * max((x.max() for x, _ in rows.values() if len(x)), default=1.0)
    with canvas(width=5.2, height=4.4) as (fig, ax):
        ax.plot([0, end], [0, end], color=GREY, lw=1.2, label="equal")
        for e in (0.25, 0.5, 1.0):
            for slope in ((1 + e) ** -0.5, (1 - e) ** -0.5 if e < 1 else None):
                if slope is not None:
                    ax.plot([0, end], [0, slope * end], color=GREY, lw=0.7, ls="--")
        for i, (name, (x, f)) in enumerate(rows.items()):
            some = np.linspace(0, len(x) - 1, min(points, len(x))).astype(int)
            ax.scatter(x[some], f[some], s=6, lw=0, alpha=0.6, color=PALETTE[i % len(PALETTE)], label=name)
        ax.set(xlabel="norm of the row", ylabel="norm of the code", xlim=(0, end), ylim=(0, None))
        fig.legend(loc="outside lower center", ncols=_columns(5.2, [*rows, "equal"]))
        return figure(fig, f"Norms of codes against norms of rows for {', '.join(rows)}", caption)
