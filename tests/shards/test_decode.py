import io

import numpy as np
import pytest
from PIL import Image

from mmsae.shards import BrokenImage, decode, decode_image


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


def jpegs():
    """JPEGs of every kind: colours, greys, inks, progressive, with other data in front."""
    g = np.random.default_rng(0)
    a = np.cumsum(np.cumsum(g.normal(size=(40, 45, 3)), 0), 1)
    image = Image.fromarray(((a - a.min()) / np.ptp(a) * 255).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds = ({}, {"progressive": True}, {"quality": 95, "subsampling": 0}, {"exif": exif}, {"comment": b"hi"})
    return [saved(image.convert(mode), "JPEG", **kw) for mode in ("RGB", "L", "CMYK") for kw in kinds]


def outcome(data):
    try:
        return pixels(data)
    except BrokenImage as e:
        return str(e)


@pytest.fixture
def both(monkeypatch):
    """A function that decodes with simplejpeg where that may, and without it."""

    def run(data, module):
        found = []
        for fast in (module, None):
            monkeypatch.setattr(decode, "_simplejpeg", lambda fast=fast: fast)
            found.append(outcome(data))
        return found

    return run


def same(a, b):
    return type(a) is type(b) and (a == b if isinstance(a, str) else np.array_equal(a, b))


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow about EXIF that is damaged
def test_simplejpeg_and_pillow_have_the_same_pixels_and_refuse_the_same_files(both):
    module = pytest.importorskip("simplejpeg")
    files, g = jpegs(), np.random.default_rng(1)
    assert all(same(*both(data, module)) for data in files)
    for i in range(1500):  # cut, or a few bytes of the head or of the whole are others
        data = bytearray(files[g.integers(len(files))])
        if i % 5 == 0:
            data = data[: g.integers(1, len(data))]
        else:
            for _ in range(g.integers(1, 4)):
                data[g.integers(len(data) if i % 5 == 1 else min(700, len(data)))] = g.integers(256)
        assert same(*both(bytes(data), module)), data.hex()


class Fake:
    """In place of simplejpeg, with what it says of a file; its images are grey."""

    def __init__(self, height=40, width=45, colours="YCbCr", error=None):
        self.header, self.error, self.decoded = (height, width, colours, "420"), error, 0

    def decode_jpeg_header(self, data, strict):
        assert strict
        return self.header

    def decode_jpeg(self, data, colours, strict):
        assert strict and colours == "RGB"
        self.decoded += 1
        if self.error:
            raise self.error
        return np.full((*self.header[:2], 3), 128, dtype=np.uint8)


def test_pillow_decodes_what_is_not_for_simplejpeg(both, make):
    jpeg, png = jpegs()[0], make.picture((1, 2, 3), format="PNG")
    fast = Fake()
    assert (both(jpeg, fast)[0] == 128).all() and fast.decoded == 1
    large = int(Image.MAX_IMAGE_PIXELS**0.5) + 1
    for data, fake, tried in (
        (png, Fake(), 0),
        (jpeg, Fake(colours="CMYK"), 0),
        (jpeg, Fake(colours="RGB"), 0),
        (jpeg, Fake(large, large), 0),
        (jpeg, Fake(error=ValueError("Premature end of JPEG file")), 1),
    ):
        assert same(*both(data, fake)) and fake.decoded == tried
    assert outcome(jpeg[:300]).startswith("300 bytes: ")


def test_the_decoder_is_known_by_name(monkeypatch):
    for module, name in ((Fake(), "simplejpeg"), (None, "Pillow")):
        monkeypatch.setattr(decode, "_simplejpeg", lambda module=module: module)
        assert decode.decoder() == name
