"""Scorers of pictures agree with the renders that they look at."""

import numpy as np
import pytest
import torch

from mmsae.types import InputError
from mmsae.world.generator.captions import full_captions
from mmsae.world.generator.render import render
from mmsae.world.generator.scene import COLOURS, sample_scenes
from mmsae.world.measure.probe import WorldProbe
from mmsae.world.measure.scorers import asked, background, colour, probed, wanted


@pytest.fixture(scope="module")
def pictures():
    scenes = sample_scenes(60, 5, siblings=False)
    scenes = scenes.rows(~scenes.two)
    images = torch.from_numpy(render(scenes, 5)).permute(0, 3, 1, 2).float() / 255
    return images, full_captions(scenes), scenes


def test_pixels_see_what_was_rendered(pictures):
    images, captions, scenes = pictures
    assert asked("colour")(images, captions).mean() == 1 and asked("background")(images, captions).mean() == 1
    red = colour("red")(images, captions).numpy() == 1
    assert (red == (scenes.objects[:, 0, 1] == COLOURS.index("red"))).all() and 0 < red.sum() < len(red)
    assert background("dark")(images, captions).sum() == (scenes.background == 0).sum()


def test_what_a_prompt_asks_for():
    assert wanted("colour", ["a blue ring", "a ring"]).tolist() == [COLOURS.index("blue"), -2]
    with pytest.raises(InputError, match="pixels tell colour, background, not 'shape'"):
        asked("shape")
    with pytest.raises(InputError, match="colour 'pink' is not one of red"):
        colour("pink")


def test_a_classifier_from_a_file(pictures, tmp_path):
    images, captions, _ = pictures
    torch.manual_seed(0)
    probe = WorldProbe(4).eval()
    probe.save(tmp_path / "probe.safetensors")
    said = probe.predict((images * 255).round().byte().permute(0, 2, 3, 1).numpy())["shape"]
    hits = probed(str(tmp_path / "probe.safetensors"), "shape")(images, captions)
    np.testing.assert_array_equal(hits.numpy(), said == wanted("shape", captions))
    fixed = probed(str(tmp_path / "probe.safetensors"), "shape", "ring")(images, captions)
    np.testing.assert_array_equal(fixed.numpy(), said == 4)
