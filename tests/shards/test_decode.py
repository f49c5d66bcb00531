import io

import numpy as np
import pytest
from PIL import Image

from mmsae.shards import BrokenImage, decode_image


def saved(image, format, **kw):
    data = io.BytesIO()
    image.save(data, format, **kw)
    return data.getvalue()


def pixels(data):
    image = decode_image(data)
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_plain_images(make, format):
    found = pixels(make.picture((200, 30, 60), format=format))
    assert found.shape == (6, 8, 3) and np.abs(found.astype(int) - (200, 30, 60)).max() <= 4


def test_cmyk_jpeg(make):
    found = pixels(make.picture((0, 255, 255, 0), format="JPEG", mode="CMYK"))  # magenta and yellow ink: red
    assert np.abs(found.astype(int) - (255, 0, 0)).max() <= 4


def test_16_bit_greys_are_scaled_not_clipped():
    ramp = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)  # 0 .. 65535
    found = pixels(saved(Image.fromarray(ramp), "PNG"))
    assert (found == np.arange(256).reshape(16, 16, 1)).all()


@pytest.mark.parametrize(("mode", "colour", "rgb"), [("1", 1, 255), ("L", 77, 77), ("LA", (50, 255), 50)])
def test_grey_modes(make, mode, colour, rgb):
    assert (pixels(make.picture(colour, mode=mode)) == rgb).all()


def test_what_is_transparent_becomes_white(make):
    assert (pixels(make.picture((10, 20, 30, 0), mode="RGBA")) == 255).all()
    assert (pixels(make.picture((0, 0, 0, 128), mode="RGBA")) == 127).all()
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([9, 9, 9, 0, 0, 255])
    assert (pixels(saved(palette, "PNG")) == (0, 0, 255)).all()
    assert (pixels(saved(palette, "PNG", transparency=1)) == 255).all()


@pytest.mark.parametrize("format", ["WEBP", "GIF", "PNG"])
def test_animated_images_give_their_first_frame(format):
    frames = [Image.new("RGB", (8, 8), c) for c in ((255, 0, 0), (0, 255, 0))]
    data = saved(frames[0], format, save_all=True, append_images=frames[1:])
    assert Image.open(io.BytesIO(data)).n_frames == 2
    assert np.abs(pixels(data).astype(int) - (255, 0, 0)).max() <= 4


def test_broken_images(make, monkeypatch):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    for data in (b"", b"not an image", saved(noise, "JPEG")[:900], saved(noise, "PNG")[:900]):
        with pytest.raises(BrokenImage, match=f"{len(data)} bytes"):
            decode_image(data)
    with pytest.raises(BrokenImage, match="known image format"):  # PIL would start Ghostscript for this one
        decode_image(saved(noise, "EPS"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(BrokenImage, match="decompression bomb"):
        decode_image(saved(noise, "PNG"))


def test_a_large_picture_below_the_bound_is_decoded_without_a_word(monkeypatch, recwarn):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)
    assert pixels(saved(Image.new("RGB", (64, 64)), "PNG")).shape == (64, 64, 3) and not recwarn.list
