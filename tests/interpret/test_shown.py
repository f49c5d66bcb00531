"""How items are shown: heat over the host's view, crops inside of the image, tokens between marks."""

import numpy as np
import pytest
from PIL import Image

from mmsae.interpret.evidence.folder import Evidence
from mmsae.interpret.shown import ItemViews, overlay, patch_box
from tests.helpers.evidence import write_evidence


def test_heat_lies_where_the_host_looks():
    image = Image.new("RGB", (80, 40))
    heat = np.array([[0.0, 1.0], [0.0, 0.0]])
    out = np.asarray(overlay(image, heat, np.array([0.25, 0.0, 0.75, 1.0])))[..., 0].astype(int)
    assert out[:, :18].max() == 0 and out[:, 62:].max() == 0  # outside of the view
    assert out[5, 55] > 100 and out[35, 25] == 0


@pytest.mark.parametrize("cells", [1, 3, 50])
def test_crops_stay_inside(cells):
    for row, col in ((0, 0), (3, 3), (1, 2)):
        left, top, right, bottom = patch_box((64, 48), (4, 4), np.array([-0.1, 0, 1.1, 1]), row, col, cells)
        assert 0 <= left < right <= 64 and 0 <= top < bottom <= 48
    assert patch_box((64, 64), (4, 4), np.array([0.0, 0, 1, 1]), 1, 2, 1) == (32, 16, 48, 32)


def test_items_without_images_or_tokens(tmp_path):
    z = np.zeros((40, 1, 1), np.float32)
    z[::3] = 1
    ev = Evidence(write_evidence(tmp_path / "e", {"image": z}))
    views = ItemViews(ev, "image")
    assert not views.places and views.plain(0) == ("", None) and views.marked(0, 0) == ("", None)
    assert views.crop(0, 0) is None
