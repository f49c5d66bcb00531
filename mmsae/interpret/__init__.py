"""Evidence made readable: concept cards, code comparisons, charts and self-contained reports."""

from mmsae.interpret.figures import Figure, bar_chart, figure, line_chart
from mmsae.interpret.gallery import Card, Gallery, compare_codes, concept_cards, names_of, picture, shown_latents
from mmsae.interpret.report import Fact, Section, Table, render_report

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
