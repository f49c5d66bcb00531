"""Scorers of pictures of the world: pixels, and a classifier of its own."""

import numpy as np
import pytest
import torch

from mmsae.types import InputError
from mmsae.world.generator.render import GROUND, PALETTE, render
from mmsae.world.generator.scene import sample_scenes
from mmsae.world.measure.host import attribute_labels
from mmsae.world.measure.probe import (
    ATTRIBUTES,
    NONE,
    WorldProbe,
    pixel_background,
    pixel_colour,
    to_uint8,
    train_probe,
)


@pytest.fixture(scope="module")
def held_out():
    scenes = sample_scenes(1500, 77, siblings=False)
    scenes = scenes.rows(~scenes.two)
    return render(scenes, 77), {a: v.numpy() for a, v in attribute_labels(scenes).items()}


def test_pixels_tell_colour_and_background_of_every_render(held_out):
    images, truth = held_out
    assert (pixel_colour(images) == truth["colour"]).all() and (pixel_background(images) == truth["background"]).all()


def test_pixel_colour_of_plain_pictures():
    plain = np.tile(PALETTE[:, None, None], (1, 32, 32, 1)).astype(np.uint8)
    assert pixel_colour(plain).tolist() == list(range(6))
    assert pixel_colour((0.45 * plain).astype(np.uint8)).tolist() == list(range(6)), "dark stripes"
    grey = np.tile(GROUND[:, None, None], (1, 32, 32, 1)).astype(np.uint8)
    assert (pixel_colour(grey) == NONE).all() and pixel_background(grey).tolist() == [0, 1, 2]


def test_to_uint8():
    x = torch.tensor([[-1.0, 0.5], [1.0, 2.0]]).expand(1, 3, 2, 2)
    assert to_uint8(x).shape == (1, 2, 2, 3) and to_uint8(x)[0, :, :, 0].tolist() == [[0, 128], [255, 255]]


@pytest.mark.slow
def test_the_classifier_tells_every_attribute(held_out, tmp_path):
    images, truth = held_out
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    probe = train_probe()
    assert torch.equal(before, torch.random.get_rng_state())
    said = probe.predict(images)
    right = {a: (said[a] == truth[a]).mean() for a in ATTRIBUTES}
    assert right["shape"] > 0.97 and min(right.values()) > 0.97, right
    probe.save(tmp_path / "probe.safetensors")
    again = WorldProbe.load(tmp_path / "probe.safetensors").predict(images)
    assert all((again[a] == said[a]).all() for a in ATTRIBUTES)


def test_files_that_are_no_probe_are_refused(tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(InputError, match="cannot be read"):
        WorldProbe.load(tmp_path / "none")
    (tmp_path / "text").write_text("not a probe")
    with pytest.raises(InputError, match="cannot be read"):
        WorldProbe.load(tmp_path / "text")
    save_file({"a": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(InputError, match="holds no probe"):
        WorldProbe.load(tmp_path / "other")
