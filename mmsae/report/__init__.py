"""Drawing, tables and self-contained pages: charts, concept cards, code comparisons."""

from mmsae.lazy import lazy

__all__, __getattr__ = lazy(
    __name__,
    {
        "figures": "Figure bar_chart figure line_chart zf_plot",
        "gallery": "Card Gallery compare_codes concept_cards names_of shown_latents thumbnail",
        "page": "Fact Section Table render_report",
        "tables": "markdown_table text_table",
    },
)
