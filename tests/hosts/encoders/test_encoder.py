"""Encoders of one's own, by public names alone: what docs/how-to/hosts.md says to implement."""

import ast
import inspect
import textwrap

import pytest
import torch
from torch import nn
from torchvision.transforms import CenterCrop, Compose, Normalize, Resize, ToTensor

from mmsae.activations import ActivationStore, extract
from mmsae.hosts import Encoder, Host
from mmsae.hosts.hooks import ModulePort
from mmsae.hosts.tokenizer import HostTokenizer
from mmsae.types import IMAGE, TEXT, ImageTextBatch, InputError
from tests.helpers.encoders import CAPTIONS, tokenizer
from tests.helpers.stores import make_shards


class TinyHost(Encoder):
    def config(self):
        return {"name": "tiny"}

    def transform(self, train=False):
        return Compose([Resize(8), CenterCrop(8), ToTensor(), Normalize([0.5] * 3, [0.5] * 3)])

    def probe_input(self, modality, n):
        return torch.zeros(n, 3, 8, 8)

    def encode(self, modality, x):
        return self.model(x)


def tower():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(96, 5))


def test_ten_lines_make_a_host(tmp_path):
    b = TinyHost(tower(), "tiny")
    images = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    data = ImageTextBatch(images, None, list("abc"), [""] * 3, list("012"), [""] * 3)
    x = b.capture(data).x["image"]
    assert torch.equal(x, b.model(images)) and b.width() == 5 and b.modalities == (IMAGE,)
    with b.edit("image.embed", lambda x: x + 1):
        assert torch.equal(b.encode_image(images), x + 1)
    with b.edit("image.embed", lambda x: x * 2), b.edit("image.pooled", lambda x: x + 1):  # pooled is embed here
        assert torch.equal(b.encode_image(images), 2 * x + 1)
    assert torch.equal(b.encode_image(images), x)
    rows = b.read(data, ["0", "1[patches]", "0[pooled]"])
    assert rows[0].x.shape == (48, 6) and torch.equal(rows[1].x, rows[0].x.relu())
    torch.testing.assert_close(rows[2].x, rows[0].x.view(3, 16, 6).mean(1))
    with b.edit("0", lambda x: x * 0):
        torch.testing.assert_close(b.encode_image(images), b.model[3].bias.expand(3, 5))
    with pytest.raises(InputError, match="needs a class token"):
        b.site("0[cls]")
    with pytest.raises(InputError, match="has no module or endpoint '4'"):
        b.site("4")
    with pytest.raises(InputError, match="no text encoder"):
        b.encode_text(torch.ones(1, 2, dtype=torch.long))
    store = ActivationStore(extract(b, make_shards(tmp_path / "s"), tmp_path / "out", workers=0, progress=False))
    assert (
        store.load(modality="image").shape == (30, 5) and b.reading(["image"])["transform"].steps
    )  # split for workers


def test_the_host_in_the_test_needs_no_private_name():
    for cls in (TinyHost, PairHost):
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
        names = [n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
        names += [n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)]
        assert not [n for n in names if n.startswith("_") and not n.startswith("__")]
    for cls in (Host, Encoder):  # nor does anything that has to be implemented
        assert not [n for n in cls.__abstractmethods__ if n.startswith("_")]


class Two(nn.Module):
    """A transformer over patches behind a class token, and one over words."""

    def __init__(self):
        super().__init__()
        self.patch, self.words = nn.Conv2d(3, 8, 4, 4), nn.Embedding(18, 8)
        self.cls = nn.Parameter(torch.randn(8))
        self.image_block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.text_block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.project = nn.Linear(8, 4)

    def image(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), 1, 8), x], 1)
        return self.project(self.image_block(x)[:, 0])

    def text(self, ids):
        end = (ids == 17).int().argmax(1)
        return self.text_block(self.words(ids))[torch.arange(len(ids)), end]


class PairHost(TinyHost):
    modalities = (IMAGE, TEXT)
    context_length = 10

    @property
    def tokenize(self):
        words = tokenizer()

        def pad(texts, context_length):
            options = {"padding": "max_length", "truncation": True, "max_length": context_length}
            return words(texts, return_tensors="pt", **options)["input_ids"]

        pad.tokenizer = words
        return HostTokenizer(pad, self.context_length)

    def probe_input(self, modality, n):
        return torch.ones(n, 10, dtype=torch.long) if modality == TEXT else super().probe_input(modality, n)

    def encode(self, modality, x):
        return self.model.text(x) if modality == TEXT else self.model.image(x)

    def tower(self, module):
        return TEXT if module in ("text_block", "words") else IMAGE

    def prefix(self, modality):
        return 1, 4

    def endpoint(self, name):
        if name.startswith("image."):
            return ModulePort(self.model.project, "out" if name == "image.embed" else "in")
        return super().endpoint(name)


def test_two_towers_with_tokens_of_their_own():
    torch.manual_seed(0)
    b = PairHost(Two(), "pairs")
    images, ids = torch.randn(4, 3, 8, 8), b.tokenize(CAPTIONS)
    data = ImageTextBatch(images, ids, list("wxyz"), CAPTIONS, list("0123"), [""] * 4)
    x = b.capture(data).x
    with torch.no_grad():
        assert torch.equal(x["image"], b.model.image(images)) and torch.equal(x["text"], b.model.text(ids))
    cls, patches, pooled = b.read(data, ["image_block[cls]", "image_block[patches]", "image.pooled"])
    assert torch.equal(cls.x, pooled.x) and len(patches.x) == 16 and cls.special.all() and not patches.special.any()
    torch.testing.assert_close(b.model.project(pooled.x), x["image"])
    mask, eos, content = b.read(data, ["text_block[mask]", "text_block[eos]", "text_block[content]"])
    assert torch.bincount(mask.item).tolist() == [5, 9, 4, 2] and eos.position.tolist() == [4, 8, 3, 1]
    torch.testing.assert_close(eos.x, x["text"])
    assert torch.bincount(content.item, minlength=4).tolist() == [3, 7, 2, 0]
    with b.edit("text_block[eos]", lambda x: x + 1), torch.no_grad():
        torch.testing.assert_close(b.encode_text(ids), x["text"] + 1)
    assert b.tokenize.too_long(["a red", "a " * 20]) == [False, True] and set(b.default_sites()) == {IMAGE, TEXT}
