import re

import numpy as np

from mmsae.report import zf_plot


def test_points_are_few_and_bands_are_drawn():
    x = np.linspace(1, 3, 5000)
    drawn = zf_plot({"all": (x, 0.9 * x), "few": ([1.0, 2.0], [1.0, 2.5])}, caption="Norms", points=300)
    assert drawn.caption == "Norms" and "Norms of codes against norms of rows for all, few" in drawn.html
    assert len(re.findall(r"<use ", drawn.html.split("PathCollection_1")[1].split("PathCollection_2")[0])) == 300
    assert len(re.findall(r"stroke-dasharray: (?!none)", drawn.html)) == 5
    assert "norm of the row" in zf_plot({"none": ([], [])}).html
