import re

import numpy as np
import pytest

from mmsae.report import figures, zf_plot


def test_points_are_few_and_bands_are_drawn():
    x = np.linspace(1, 3, 5000)
    drawn = zf_plot({"all": (x, 0.9 * x), "few": ([1.0, 2.0], [1.0, 2.5])}, caption="Norms", points=300)
    assert drawn.caption == "Norms" and "Norms of codes against norms of rows for all, few" in drawn.html
    assert len(re.findall(r"<use ", drawn.html.split("PathCollection_1")[1].split("PathCollection_2")[0])) == 300
    assert len(re.findall(r"stroke-dasharray: (?!none)", drawn.html)) == 5
    assert "norm of the row" in zf_plot({"none": ([], [])}).html


@pytest.mark.parametrize(
    "names", ["ab", "concepts|concepts, held first|held first, then dense sum|dense phrase|dense sum"]
)
def test_a_legend_is_no_wider_than_its_figure(names, monkeypatch):
    monkeypatch.setattr(figures, "figure", lambda fig, *said: fig)
    names = names.split("|")
    for fig in (
        figures.bar_chart({n: {"a query": 0.5} for n in names}, y_label="y"),
        figures.line_chart({"panel": {n: ([0, 1], [0, 1]) for n in names}}, x_label="x"),
    ):
        fig.draw_without_rendering()
        box = fig.legends[0].get_window_extent()
        assert 0 <= box.x0 and box.x1 <= fig.bbox.x1 and len(fig.legends[0].get_texts()) == len(names)
