"""timm hosts, against timm's own forward passes."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from mmsae.hosts import TimmHost, load_host
from mmsae.types import ImageTextBatch, InputError


@pytest.fixture(scope="module", params=["test_vit", "test_resnet", "test_convnext"])
def timm_host(request):
    with pytest.warns(UserWarning, match="random"):
        return load_host(f"timm:{request.param}", allow_random=True)


def test_embed_is_what_the_classifier_sees(timm_host, batch_for):
    b, batch = timm_host, batch_for(timm_host)
    x = b.capture(batch).x["image"]
    assert torch.equal(x, b.encode_image(batch.images)) and x.shape[1] == b.width()
    torch.testing.assert_close(b.model.get_classifier()(x), b.model(batch.images))
    with b.edit("image.embed", lambda x: x * 3):
        torch.testing.assert_close(b.encode_image(batch.images), 3 * x)
        torch.testing.assert_close(b.model(batch.images), b.model.get_classifier()(3 * x))
    with b.edit("image.embed", lambda x: x):
        same = b.model(batch.images)
    assert torch.equal(same, b.model(batch.images)) and "forward_head" not in b.model.__dict__
    assert b.modalities == ("image",) and b.tokenize is None


def test_block_tokens(batch_for):
    b = TimmHost(timm.create_model("test_vit"), "mine")
    batch = batch_for(b)
    _, states = b.model.forward_intermediates(batch.images, indices=1, norm=False, output_fmt="NLC")
    rows = b.capture(batch, {"image": "blocks.5:out[patches]"})
    torch.testing.assert_close(rows.x["image"], states[-1].flatten(0, 1))
    assert b.read(batch, ["blocks.0[cls]"])[0].special.all()
    whole, c = b.read(batch, ["blocks.5"])[0].x.view(4, -1, 64), torch.arange(64.0)
    with b.edit("blocks.5", lambda x: x * 1.5 + c):
        want = b.model.forward_head(b.model.norm(whole * 1.5 + c), pre_logits=True)
        torch.testing.assert_close(b.encode_image(batch.images), want)


def test_registers_are_special_and_no_patches(batch_for):
    model = timm.create_model("vit_little_patch16_reg4_gap_256", img_size=32, embed_dim=32, depth=1, num_heads=2)
    b = TimmHost(model, "mine")
    prefix, patches = b.model.num_prefix_tokens, b.model.patch_embed.num_patches
    images = torch.randn(2, 3, 32, 32)
    b.probe_input = lambda modality, n: torch.zeros(n, 3, 32, 32)
    batch = ImageTextBatch(images, None, None, [], [], [])
    every, only = b.read(batch, ["blocks.0", "blocks.0[patches]"])
    assert every.special.sum() == 2 * prefix == 8 and len(only.x) == 2 * patches
    assert torch.equal(only.x, every.x[~every.special])


def test_channels_last_maps(batch_for):
    model = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=64, window_size=4, embed_dim=16, depths=(1, 1), num_heads=(1, 2)
    )
    b = TimmHost(model, "mine")
    b.probe_input = lambda modality, n: torch.zeros(n, 3, 64, 64)
    images = torch.randn(2, 3, 64, 64)
    got = b.capture(ImageTextBatch(images, None, None, [], [], []), ["layers.1.blocks.0"]).x["image"]
    assert got.shape == (2 * 8 * 8, 32)
    with pytest.raises(InputError, match="cannot be a site"):
        b.site("layers.0.blocks.0.attn")  # windows are merged into the batch


def test_transform_is_timms_own(timm_host):
    b = timm_host
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (200, 180, 3), dtype=np.uint8))
    want = timm.data.create_transform(**timm.data.resolve_model_data_config(b.model))(noise)
    assert torch.equal(b.transform()(noise), want)


def test_no_text_and_the_seed_decides_random_weights(timm_host, batch_for):
    b = timm_host
    with pytest.raises(InputError, match="no text encoder"):
        b.encode_text(torch.ones(1, 3, dtype=torch.long))
    with pytest.warns(UserWarning):
        assert load_host(b.hint, allow_random=True).fingerprint == b.fingerprint
        assert load_host(b.hint, allow_random=True, seed=1).fingerprint != b.fingerprint


def test_the_classifier_is_the_models_own(timm_host, batch_for):
    weight, bias = timm_host.classifier
    images = batch_for(timm_host).images
    torch.testing.assert_close(timm_host.encode_image(images) @ weight.T + bias, timm_host.model(images))


def test_hosts_whose_logits_are_not_linear_in_their_embeddings_have_no_classifier():
    assert TimmHost(timm.create_model("test_vit", num_classes=0), "none").classifier is None
    model = timm.create_model("test_vit")
    model.forward_head = lambda x, pre_logits=False: type(model).forward_head(model, x, pre_logits).tanh()
    assert TimmHost(model, "bent").classifier is None


def distilled(kind):
    torch.manual_seed(0)
    if kind == "tokens":
        return timm.create_model(
            "deit_tiny_distilled_patch16_224", img_size=32, embed_dim=32, depth=1, num_heads=2, num_classes=5
        )
    return timm.create_model("levit_128s", num_classes=5)


@pytest.mark.parametrize("kind", ["tokens", "pooled"])
def test_a_model_with_two_classifiers(kind, batch_for):
    b = TimmHost(distilled(kind), kind)
    images = torch.randn(2, *b.probe_input("image", 1).shape[1:])
    with torch.no_grad():
        clean, shift = b.model(images), torch.linspace(-1, 1, b.width())
        with b.edit("image.embed", lambda x: x.clone()):
            torch.testing.assert_close(b.model(images), clean)
        with b.edit("image.embed", lambda x: x + shift):
            moved, pooled = b.model(images), b.encode_image(images)
        assert (moved - clean).abs().max() > 1e-3
        if kind == "tokens":  # two linear classifiers: the mean of their weights says by how much logits move
            weight = (b.model.head.weight + b.model.head_dist.weight) / 2
            torch.testing.assert_close(moved - clean, (weight @ shift).expand_as(moved), atol=1e-5, rtol=1e-4)
        else:
            torch.testing.assert_close(moved, (b.model.head(pooled) + b.model.head_dist(pooled)) / 2)
