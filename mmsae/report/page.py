"""A self-contained HTML report: one file, no scripts, nothing fetched, readable in light and dark and on paper."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment
from markupsafe import Markup, escape

from mmsae.files import atomic_file
from mmsae.report.figures import Figure
from mmsae.report.gallery import CodePair, Gallery
from mmsae.types import InputError

TEMPLATE, STYLE = (Path(__file__).with_name(name) for name in ("template.html", "style.css"))


class Fact(NamedTuple):
    """A number worth a tile: label, value (formatted like table cells) and an optional note."""

    label: str
    value: Any
    note: str = ""


class Table(NamedTuple):
    """A table."""

    columns: Sequence[str]  #: Headings; the first column holds the row names
    rows: Sequence[Sequence[Any]]  #: Cells: numbers (three decimals), text, None or NaN for "no value"
    caption: str = ""  #: Shown above
    best: Mapping[str, str] = {}  #: ``{column heading: "max" | "min"}`` of the columns whose best cell is marked


class Section(NamedTuple):
    """A part of a report; whatever is empty is left out."""

    title: str  #: Heading, also its entry in the contents
    #: Text: ``Markup`` as it is, else light markdown (paragraphs, ``-`` lists, ``**bold**``, ``*emphasis*``,
    #: backquoted code); HTML in it is shown, not interpreted
    intro: str | Markup = ""
    figures: Sequence[Figure] = ()  #: Charts and images
    tables: Sequence[Table] = ()  #: Tables
    galleries: Sequence[Gallery] = ()  #: Concept cards
    facts: Sequence[Fact] = ()  #: Tiles above everything else
    pairs: Sequence[CodePair] = ()  #: Codes of pairs, shown side by side
    warnings: Sequence[str] = ()  #: Sentences that the reader must not miss


def number(value: Any) -> str:
    """A cell: three decimals for floats (an exponent where that would read 0), separators for integers."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if value and abs(value) < 5e-4:
        return f"{value:.1e}"
    return f"{value:,.3f}" if abs(value) < 1000 else f"{value:,.0f}"


def best_rows(table: Table) -> dict[int, set[int]]:
    """``{column: rows with its best number}`` of the columns that ``table.best`` names."""
    out = {}
    for name, direction in table.best.items():
        if name not in table.columns or direction not in ("max", "min"):
            raise InputError(f"table has no column {name!r}, or {direction!r} is neither 'max' nor 'min'")
        c = list(table.columns).index(name)
        cells = {r: row[c] for r, row in enumerate(table.rows) if isinstance(row[c], int | float) and row[c] == row[c]}
        if len(cells) > 1:
            top = (max if direction == "max" else min)(cells.values())
            out[c] = {r for r, v in cells.items() if number(v) == number(top)}
    return out


def word_columns(table: Table) -> set[int]:
    """Columns with text in them, set flush left."""
    return {c for row in table.rows for c, cell in enumerate(row) if isinstance(cell, str)}


def prose(text: str | Markup) -> Markup:
    """Light markdown to HTML; ``Markup`` passes through."""
    if isinstance(text, Markup):
        return text
    blocks = []
    for block in re.split(r"\n\s*\n", text.strip()):
        lines = [str(escape(line.strip())) for line in block.splitlines()]
        if lines and all(line.startswith("- ") for line in lines):
            blocks.append("<ul>" + "".join(f"<li>{_inline(line[2:])}</li>" for line in lines) + "</ul>")
        elif any(lines):
            blocks.append(f"<p>{_inline(' '.join(lines))}</p>")
    return Markup("\n".join(blocks))


def _inline(text: str) -> str:
    parts = re.split(r"`([^`]+)`", text)
    for i, part in enumerate(parts):
        if i % 2:
            parts[i] = f"<code>{part}</code>"
        else:
            part = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", part)
            parts[i] = re.sub(r"(?<!\w)\*(\S(?:.*?\S)?)\*(?!\w)", r"<em>\1</em>", part)
    return "".join(parts)


def _slug(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def render_report(
    path: str | os.PathLike,
    title: str,
    sections: Sequence[Section],
    *,
    lead: str | Markup = "",
    meta: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
) -> Path:
    """Write a report to ``path`` (by temporary name and rename).

    Args:
        path: The HTML file.
        title: Heading of the page.
        sections: Parts of the page.
        lead: Text below the heading, as ``Section.intro``.
        meta: Small print below the lead: ``{label: value}``, e.g. the profile, seed and version.
        data: Numbers shown as JSON in a closed box at the end.

    Returns:
        The path.
    """
    env = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    env.filters.update(number=number, prose=prose, slug=_slug)
    env.globals.update(best_rows=best_rows, word_columns=word_columns)
    html = env.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        css=Markup(STYLE.read_text(encoding="utf-8")),
        title=title,
        sections=sections,
        lead=lead,
        meta=meta or {},
        data=None if data is None else json.dumps(data, indent=2, ensure_ascii=False),
    )
    with atomic_file(path) as temp:
        temp.write_text(html.lstrip(), encoding="utf-8")
    return Path(path)
