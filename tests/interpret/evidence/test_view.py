"""Where a host looks in an image, against what transforms are known to do, and by a single patch that lights up."""

import numpy as np
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from timm.data import create_transform
from torchvision.transforms import CenterCrop, Compose, Normalize, Pad, Resize, ToTensor

from mmsae.interpret.evidence.folder import Evidence
from mmsae.interpret.evidence.job import collect_evidence
from mmsae.interpret.evidence.options import Evidencing
from mmsae.interpret.evidence.view import WHOLE, Views, view_box
from mmsae.options import SAERun
from mmsae.shards import ShardWriter
from tests.helpers.encoders import MODELS, save_local
from tests.helpers.evaluation import png, save_sae

NORM = Normalize((0.48, 0.46, 0.41), (0.27, 0.26, 0.28))


def crop(size):
    return Compose([Resize(size), CenterCrop(size), ToTensor(), NORM])


@pytest.mark.parametrize(("width", "height"), [(64, 64), (120, 60), (50, 90), (640, 480), (33, 31), (1999, 700)])
def test_the_box_of_a_centre_crop(width, height):
    side = min(width, height)
    left, top = (width - side) / 2 / width, (height - side) / 2 / height
    box = view_box(crop(48), width, height)
    assert np.allclose(box, (left, top, 1 - left, 1 - top), atol=1.2 / 48 * side / max(width, height) + 0.004)


@pytest.mark.parametrize(("width", "height"), [(64, 64), (120, 60), (50, 90)])
def test_the_box_of_what_squeezes_and_of_what_pads(width, height):
    norm = {"size": 48, "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.2)}
    squash = image_transform_v2(PreprocessCfg(**norm, resize_mode="squash"), is_train=False)
    assert np.allclose(view_box(squash, width, height), WHOLE, atol=0.01)
    longest = image_transform_v2(PreprocessCfg(**norm, resize_mode="longest"), is_train=False)
    long = max(width, height)
    out = (long - width) / 2 / width, (long - height) / 2 / height
    assert np.allclose(view_box(longest, width, height), (-out[0], -out[1], 1 + out[0], 1 + out[1]), atol=0.04)
    timm = create_transform(input_size=(3, 48, 48), crop_pct=0.8, interpolation="bicubic")
    side = 0.8 * min(width, height)
    expected = ((width - side) / 2 / width, (height - side) / 2 / height)
    assert np.allclose(view_box(timm, width, height)[:2], expected, atol=0.015)


def test_edges_that_are_no_resize(tmp_path):
    padded = Compose([Pad((10, 0, 0, 20)), ToTensor(), NORM])
    assert np.allclose(view_box(padded, 40, 30), (-10 / 40, 0, 1, 50 / 30), atol=0.01)
    assert view_box(lambda i: torch.zeros(3, 8, 8), 40, 30) == WHOLE  # its pixels do not tell
    calls = []
    views = Views(lambda i: calls.append(i.size) or crop(16)(i))
    first, n = views(60, 40), len(calls)
    assert views(60, 40) == first and len(calls) == n  # known
    assert views(6000, 4000) == pytest.approx(views(512, 341), abs=1e-9)


@pytest.mark.parametrize(("width", "height"), [(64, 32), (32, 80), (48, 48)])
def test_a_patch_that_lights_up_is_where_it_is_in_the_image(tmp_path, width, height):
    """Oracle O10: heat through the view box lies on the pixels that made it, whatever the shape of the image."""
    for mode in ("shortest", "longest", "squash"):
        save_local(tmp_path / mode, MODELS["vit"])
        config = tmp_path / mode / "open_clip_config.json"
        config.write_text(config.read_text().replace('"squash"', f'"{mode}"'))
        sides = {"shortest": (min(width, height),) * 2, "longest": (max(width, height),) * 2, "squash": (width, height)}
        _round_trip(tmp_path / f"{mode}-run", f"local-dir:{tmp_path / mode}", width, height, np.array(sides[mode]) / 4)


def _round_trip(root, host, width, height, cell):
    """``cell`` is the width and height of one of 4 x 4 patches in pixels of the image."""
    rng, spots = np.random.default_rng(1), []
    with ShardWriter(root / "shards", "s") as w:
        for i in range(12):
            picture = np.full((height, width, 3), 90, np.uint8)
            side = min(width, height)
            x, y = ((s - side) // 2 + int(rng.integers(2, side - 10)) for s in (width, height))
            if i:  # the first has no spot: what differs from it is the spot
                picture[y : y + 8, x : x + 8] = (255, 0, 255)
            spots.append(((x + 4) / width, (y + 4) / height))
            w.write(f"k{i:02d}", {"png": png(picture), "json": {"uid": f"{i:032x}"}})
    # the embedding of a patch before any attention: what it depends on is the patch alone
    sae = save_sae(root / "sae", host, site="visual.conv1:out[all]", d_sae=96, k=4)
    choice = Evidencing(min_items=1, copies=True)
    collect_evidence(sae, str(root / "shards"), root / "out", choice=choice,
                     run=SAERun(device="cpu", workers=0, progress=False))  # fmt: skip
    e = Evidence(root / "out")
    grid, items, off = e.grid("image"), e.items, []
    maps = np.zeros((e.n, e.d_sae, grid.places), np.float32)
    for i in range(e.n):
        tokens = e.tokens(i, "image")
        maps[int(items.uid[i], 16), tokens.latent, tokens.position] = tokens.value
    for i in (i for i in range(e.n) if int(items.uid[i], 16)):
        odd = np.abs(maps[int(items.uid[i], 16)] - maps[0]).sum(0)
        row, col = divmod(int(odd.argmax()), grid.cols)
        left, top, right, bottom = items.view[i]
        at = left + (col + 0.5) / grid.cols * (right - left), top + (row + 0.5) / grid.rows * (bottom - top)
        spot = spots[int(items.uid[i], 16)]
        off.append(((at[0] - spot[0]) * width, (at[1] - spot[1]) * height))
    # the middle of a patch that sees at least a part of a spot of 8 pixels
    assert (np.abs(off) <= cell / 2 + 4.5).all() and (np.abs(np.mean(off, 0)) <= cell / 3 + 1).all()


def test_coordinates_are_of_the_size_asked_for():
    from mmsae.interpret.evidence.view import coordinates

    image = coordinates(7, 5)
    assert isinstance(image, Image.Image) and image.size == (7, 5)
