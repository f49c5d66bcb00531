"""Figures of notebooks: what they show without a notebook server, and when there are sliders."""

import sys
from types import ModuleType, SimpleNamespace

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from mmsae.metrics import top_evidence
from mmsae.report import compare_codes, notebook
from mmsae.types import Codes

matplotlib.use("Agg")


@pytest.fixture
def figures(monkeypatch):
    """The figures that were shown."""
    import matplotlib.pyplot as plt

    shown = []
    monkeypatch.setattr(plt, "show", lambda: shown.append(plt.gcf()))
    yield shown
    plt.close("all")


def test_pictures_of_every_kind_become_arrays():
    red = np.zeros((2, 3, 3), np.uint8)
    red[..., 0] = 255
    for image in (red, Image.fromarray(red), torch.tensor([1.0, 0, 0])[:, None, None].expand(3, 2, 3)):
        np.testing.assert_array_equal(notebook.as_array(image), red)
    grey = notebook.as_array(Image.new("L", (4, 2), 7))
    assert grey.shape == (2, 4, 3) and (grey == 7).all()


def test_images_stand_in_rows_with_their_titles(figures):
    notebook.show_images([np.zeros((4, 4, 3), np.uint8)] * 5, list("abcde"), columns=3, rows=["one", "two"])
    [figure] = figures
    assert [len(a.images) for a in figure.axes] == [1, 1, 1, 1, 1, 0]
    assert [a.get_title() for a in figure.axes] == [*"abcde", ""]
    assert [a.get_ylabel() for a in figure.axes[::3]] == ["one", "two"]


def test_latents_are_shown_with_what_they_fire_on_most(figures):
    uids = [f"{i:032x}" for i in range(3)]
    z = Codes(torch.tensor([[1.0, 0.0], [3.0, 0.0], [2.0, 4.0]]), None, 2)
    tables = {m: top_evidence(z, uids, 2) for m in ("image", "text")}
    pictures = {u: np.full((2, 2, 3), i, np.uint8) for i, u in enumerate(uids)}
    captions = dict(zip(uids, ("zero", "one", "two"), strict=True))
    notebook.show_latents([0, 1], tables, pictures.get, captions, {1: "name"}, n_images=2)
    [figure] = figures
    lines = [figure.axes[i : i + 4] for i in (0, 4)]
    first = [int(a.images[0].get_array()[0, 0, 0]) for a in lines[0][1:3]]
    assert first == [1, 2] and lines[0][3].texts[0].get_text() == "one\ntwo"
    assert lines[1][0].texts[0].get_text() == "#1 name" and len(lines[1][2].images) == 0  # it fires on one only


def test_codes_of_a_pair_go_to_either_side(figures):
    image, text = (Codes(torch.tensor([v]), None, 3) for v in ([1.0, 0.0, 2.0], [0.0, 3.0, 2.0]))
    notebook.show_codes([compare_codes(image, text, "Pair", "a caption")])
    bars = figures[0].axes[1]
    widths = [p.get_width() for p in bars.patches]
    assert sorted(widths) == [-2.0, -1.0, 0.0, 0.0, 2.0, 3.0]
    assert bars.get_yticklabels()[0].get_text() == "#2"  # shared latents first


def test_a_slider_without_a_server_draws_once(monkeypatch):
    drawn = []
    monkeypatch.setenv("MMSAE_WIDGETS", "0")
    notebook.slider(lambda x=2: drawn.append(x), x=[1, 2, 3])
    monkeypatch.delenv("MMSAE_WIDGETS")
    notebook.slider(lambda x=3: drawn.append(x), x=[1, 2, 3])  # no notebook here
    assert drawn == [2, 3] and not notebook.interactive()


def test_a_slider_with_a_server_offers_the_choices(monkeypatch):
    made = {}
    widgets = ModuleType("ipywidgets")
    widgets.SelectionSlider = lambda **options: options
    widgets.interact = lambda draw, **sliders: made.update(sliders)
    shell = ModuleType("IPython")
    shell.get_ipython = lambda: SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "ipywidgets", widgets)
    monkeypatch.setitem(sys.modules, "IPython", shell)
    monkeypatch.setattr(notebook, "find_spec", lambda name: object())
    monkeypatch.delenv("MMSAE_WIDGETS", raising=False)
    notebook.slider(lambda x=2: pytest.fail("drawn by the slider only"), x=[1, 2, 3])
    assert made["x"]["options"] == [1, 2, 3] and made["x"]["value"] == 2
