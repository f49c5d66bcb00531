"""Evidence made readable: concept cards, code comparisons, charts and self-contained reports."""

from mmsae.report.figures import Figure, bar_chart, figure, line_chart
from mmsae.report.gallery import Card, Gallery, compare_codes, concept_cards, names_of, picture, shown_latents
from mmsae.report.page import Fact, Section, Table, render_report

__all__ = [
    "Card",
    "Fact",
    "Figure",
    "Gallery",
    "Section",
    "Table",
    "bar_chart",
    "compare_codes",
    "concept_cards",
    "figure",
    "line_chart",
    "names_of",
    "picture",
    "render_report",
    "shown_latents",
]
