"""Tables in plain text: aligned columns for the terminal, markdown for documents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def _cell(value: Any, none: str, digits: int = 3) -> str:
    return f"{value:.{digits}f}" if isinstance(value, float) else none if value is None else str(value)


def text_table(rows: Sequence[Sequence[Any]], header: Sequence[str]) -> str:
    """Aligned columns; floats with three decimals, None as a dash."""
    cells = [list(map(str, header)), *([_cell(c, "-") for c in r] for r in rows)]
    width = [max(len(r[i]) for r in cells) for i in range(len(header))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(r, width, strict=True)).rstrip() for r in cells)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[Any]], *, digits: int = 3, none: str = "–") -> str:
    """A table of a document, without a newline at the end; floats have ``digits`` decimals, ``none`` is for None."""
    lines = [header, *([_cell(c, none, digits) for c in r] for r in rows)]
    head, *body = ("| " + " | ".join(line) + " |" for line in lines)
    return "\n".join([head, "|" + "---|" * len(header), *body])
