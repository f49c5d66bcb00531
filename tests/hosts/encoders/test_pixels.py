"""What of a host's transform is left to its device: the same bits for its end, and for resizing a stated nearness."""

import pickle

import numpy as np
import open_clip
import pytest
import timm
import torch
from PIL import Image
from torchvision import transforms

from mmsae.hosts import TimmHost
from mmsae.hosts.encoders.pixels import Agreement, split
from mmsae.shards.batches import Reader
from mmsae.shards.read import Sample
from mmsae.types import InputError

CPU = torch.device("cpu")


def pictures(*sizes):
    """Smooth colours with some noise, ``(h, w)`` each: what photographs are to an interpolation."""
    rng, made = np.random.default_rng(0), []
    for h, w in sizes:
        y, x = np.mgrid[:h, :w]
        waves = [np.sin(x / a) * np.cos(y / b) for a, b in ((7, 11), (5, 3), (13, 2))]
        noise = rng.normal(0, 8, (h, w, 3))
        made.append(Image.fromarray((127 + 100 * np.stack(waves, 2) + noise).clip(0, 255).astype(np.uint8)))
    return made


def batch(transform, images):
    """A batch of images as workers make it."""
    reader = Reader.of(transform, None, 8, ["image"])
    rows = [(Sample(f"{i}", f"{i}", "s", None, "", {}, None, {}), transform(image)) for i, image in enumerate(images)]
    return reader.stack(rows)


@pytest.fixture(params=["open_clip", "timm"])
def either(request, host):
    if request.param == "open_clip":
        return host("vit")
    torch.manual_seed(0)
    return TimmHost(timm.create_model("test_vit"), "mine")


def test_both_parts_of_a_transform_give_its_bits():
    for whole in (
        open_clip.image_transform(48, is_train=False, mean=(0.48, 0.46, 0.41), std=(0.27, 0.26, 0.28)),
        timm.data.create_transform((3, 40, 40), crop_pct=0.9, interpolation="bicubic"),
    ):
        head, scale = split(whole, CPU)
        images = pictures((60, 70), (33, 90), (48, 48))
        travelled = torch.stack([pickle.loads(pickle.dumps(head))(image) for image in images])
        assert travelled.dtype == torch.uint8 and travelled.is_contiguous()
        want = torch.stack([whole(image) for image in images])
        assert torch.equal(scale(travelled), want) and scale(travelled).stride() == want.stride()
        assert repr(head) == repr(whole)  # which kept files are known by


def test_a_transform_that_ends_otherwise_stays_whole():
    normalise = transforms.Normalize(0.5, 0.2)
    for steps in (
        [transforms.Resize(8), transforms.ToTensor()],
        [transforms.ToTensor(), normalise, transforms.Resize(8)],
        [transforms.ToTensor(), normalise, normalise],
        [],
    ):
        assert split(transforms.Compose(steps), CPU) is None
    assert split(lambda image: image, CPU) is None

    class Dark(transforms.ToTensor):
        def __call__(self, image):
            return super().__call__(image) * 0.9

    assert split(transforms.Compose([Dark(), normalise]), CPU) is None  # found by trying it


def test_a_host_reads_pixels_as_it_reads_floats(either):
    images = pictures((40, 50), (64, 64), (32, 80))
    pixels = batch(either.reading({"image"})["transform"], images)
    floats = batch(either.transform(), images)
    assert pixels.images.dtype == torch.uint8 and floats.images.dtype == torch.float32
    for b in (either.prepared(pixels), either.prepared(pixels, "cpu"), either.prepared(floats)):
        assert torch.equal(b.images, floats.images) and b.uids == pixels.uids
    a, b = (either.read(x, ["image.embed"])[0].x for x in (pixels, floats))
    assert torch.equal(a, b)
    assert torch.equal(either.capture(pixels, ["image.embed"]).x["image"], a)


def test_images_are_resized_on_the_device(either):
    images = pictures((40, 50), (200, 170), (40, 50), (90, 300))
    made = batch(either.unsized(), images)
    assert made.images is None and made.inputs["sizes"].tolist() == [[40, 50], [200, 170], [40, 50], [90, 300]]
    agreement = Agreement.of(either, made.inputs)
    agreement.check()
    assert 0 < agreement.levels <= 2 and agreement.cosine > 0.9999  # PIL rounds between its two passes
    own = torch.stack([either.transform()(image) for image in images])
    got = either.prepared(made).images
    levels = (got - own).abs() * either._split[1].std * 255
    assert levels.max().item() == pytest.approx(agreement.levels)
    torch.testing.assert_close(either.read(made, ["image.embed"])[0].x, either.encode_image(got))


def test_what_is_too_far_from_the_transform_is_refused(either, monkeypatch):
    made = batch(either.unsized(), pictures((40, 50), (64, 64)))
    resizer = either._resizer
    monkeypatch.setattr(either, "_resizer", lambda *a: resizer(*a).roll(1, -1), raising=False)
    with pytest.raises(InputError, match=r"resize is device, and gives pixels within \d+.*leave it to host"):
        Agreement.of(either, made.inputs).check()
    with pytest.raises(InputError, match="cosines of embeddings at least nan"):
        Agreement(0.0, float("nan")).check()


def test_a_transform_that_the_device_cannot_do_is_refused(host, monkeypatch):
    b = host("vit")
    tail = [transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)]
    for steps, said in (
        ([transforms.Pad(4), *tail], "has a step Pad"),
        ([transforms.Resize(32, transforms.InterpolationMode.NEAREST), *tail], "has a step Resize"),
        ([transforms.Resize(32), *tail[:1]], "no transform that ends in a scale"),
    ):
        for name in ("_split", "_resizer"):
            monkeypatch.delitem(b.__dict__, name, raising=False)
        monkeypatch.setattr(b, "transform", lambda train=False, steps=steps: transforms.Compose(steps))
        with pytest.raises(InputError, match=said):
            b.unsized()
    for name in ("_split", "_resizer"):
        b.__dict__.pop(name, None)
