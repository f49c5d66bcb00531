"""Hosts from a function of the user's."""

import sys
from dataclasses import replace

import pytest
import torch

from mmsae.hosts import ModuleHost, embed_width, host_modalities, load_host, named_host, parse, site_width
from mmsae.types import ImageTextBatch, InputError, Site

FILE = """
import torch
from torch import nn
from torchvision.transforms import CenterCrop, Compose, Normalize, Resize, ToTensor

from mmsae.hosts import Encoder

preprocess = Compose([Resize(8), CenterCrop(8), ToTensor(), Normalize([0.5] * 3, [0.5] * 3)])


def tower(width=5, start=0):
    torch.manual_seed(start)
    return nn.Sequential(nn.Conv2d(3, 6, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(96, width)), preprocess


def maps():
    return tower()[0][:2], preprocess


class Own(Encoder):
    def config(self):
        return {}

    def transform(self, train=False):
        return preprocess

    def probe_input(self, modality, n):
        return torch.zeros(n, 3, 8, 8)

    def encode(self, modality, x):
        return self.model(x)


def own():
    return Own(tower()[0])


def ragged():
    return tower()[0], Compose([Resize(8), ToTensor()])


def model_alone():
    return tower()[0]


def fails():
    raise KeyError("weights.pth")


NUMBER = 3
"""


@pytest.fixture()
def here(tmp_path, monkeypatch):
    """A working folder with a user's file, which Python does not find by itself."""
    (tmp_path / "my_towers.py").write_text(FILE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    yield tmp_path
    sys.modules.pop("my_towers", None)


def test_a_model_and_its_preprocessing(here):
    b = load_host("module:my_towers:tower")
    assert isinstance(b, ModuleHost) and b.hint == "module:my_towers:tower" and str(here) not in sys.path
    images = torch.randn(3, 3, 8, 8)
    x = b.encode_image(images)
    with torch.no_grad():
        assert torch.equal(x, b.model(images))
        with b.edit("image.embed", lambda x: x + 1):  # holds for direct calls, too
            assert torch.equal(b.model(images), x + 1) and torch.equal(b.encode_image(images), x + 1)
    data = ImageTextBatch(images, None, list("abc"), [""] * 3, list("012"), [""] * 3)
    assert b.capture(data, "0:out[patches]").x["image"].shape == (48, 6)
    assert load_host(b.hint).fingerprint == b.fingerprint != load_host(b.hint, start=1).fingerprint
    assert host_modalities(b.hint) == ("image",) and embed_width(b.hint) == 5 and site_width(b.hint, "0") == 6
    other = load_host("module:my_towers:tower", width=7)
    assert other.hint == 'module:my_towers:tower {"width": 7}' and load_host(other.hint).width() == 7


def test_maps_are_averaged_and_hosts_are_taken_as_they_are(here):
    b = load_host("module:my_towers:maps")
    images = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(b.encode_image(images), b.model(images).mean((2, 3)))
        with b.edit("image.embed", lambda x: x * 0):
            assert not b.encode_image(images).any()
    own = load_host("module:my_towers:own", precision="bf16")
    assert type(own).__name__ == "Own" and own.precision == "bf16" and own.site("image.embed").hint == own.hint


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("module:my_towers", r"is not of the form module:IMPORT\.PATH:FUNCTION"),
        ("module:../my_towers:tower", "is not of the form"),
        ("module:no_towers:tower", "no_towers cannot be imported: .*No module named 'no_towers'"),
        ("module:my_towers:towr", r"my_towers \(.*my_towers.py\) has no function towr"),
        ("module:my_towers:NUMBER", "has no function NUMBER"),
        ("module:my_towers:fails", "my_towers:fails failed: KeyError: 'weights.pth'"),
        ("module:my_towers:model_alone", "returned a Sequential; it has to return an nn.Module and a function"),
        ("module:my_towers:ragged", r"gives \(3, 8, 10\) and \(3, 10, 8\) of two images"),
        ('module:my_towers:tower {"depth": 3}', "unexpected keyword argument 'depth'"),
    ],
)
def test_what_cannot_be_a_host(here, name, why):
    with pytest.raises(InputError, match=why):
        load_host(name)


def test_no_file_makes_us_run_code(here):
    (here / "my_towers.py").write_text("raise SystemExit('ran')")
    sites = {"image": Site("", "image.embed", modality="image", hint="module:my_towers:tower")}
    with pytest.raises(InputError, match=r"code, which is not taken from a file: .*name the host"):
        named_host("", sites)
    with pytest.raises(InputError, match="not taken from a file"):
        named_host('{"width": 3}', sites)
    assert "my_towers" not in sys.modules
    assert named_host("module:my_towers:tower", sites) == "module:my_towers:tower"  # the user says so
    assert parse("module:my_towers:tower").kind == "module" and "my_towers" not in sys.modules
    assert named_host("", {"image": replace(sites["image"], hint="timm:x")}) == "timm:x"
