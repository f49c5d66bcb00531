"""Edits reach the tensor that the host consumes, and leave nothing behind."""

import pytest
import torch
import torch.nn.functional as F

from mmsae.hosts.hooks import Shadow
from mmsae.types import InputError
from tests.helpers.encoders import MODELS, project, text_states, vit_states

KINDS = list(MODELS)


def hooks(b):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in b.model.modules())


def shadows(b):
    return [v for m in b.model.modules() for v in m.__dict__.values() if isinstance(v, Shadow)]


def encode(b, batch):
    return b.encode_image(batch.images), b.encode_text(batch.texts)


def sites_of(b):
    blocks = [n for n, m in b.model.named_modules() if type(m).__name__ in ("ResidualAttentionBlock", "Bottleneck")]
    blocks += [n for n, _ in b.model.named_modules() if n.startswith("visual.trunk.blocks.") and n.count(".") == 3]
    blocks = [n for n in blocks if not n.startswith("text_decoder")]
    ios = ("in", "out") if "resnet" in b.hint else ("in", "out", "update")  # a ResNet block changes the shape
    return [*b.endpoints, *(f"{n}:{io}" for n in blocks[::2] for io in ios)]


@pytest.mark.parametrize("kind", KINDS)
def test_identity_edits_change_no_bit(host, batch_for, kind):
    b = host(kind)
    batch = batch_for(b)
    plain = encode(b, batch)
    for site in sites_of(b):
        seen = []
        with b.edit(site, lambda x, seen=seen: seen.append(x.dtype) or x):
            edited = encode(b, batch)
        assert seen == [torch.float32], site
        assert all(torch.equal(p, e) for p, e in zip(plain, edited, strict=True)), site
    # a copy goes through the write-back
    for site in (s for s in sites_of(b) if s.endswith((":in", ":out"))):
        with b.edit(site, lambda x: x.clone()):
            assert all(torch.equal(p, e) for p, e in zip(plain, encode(b, batch), strict=True)), site
    assert hooks(b) == 0 and not shadows(b)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["image", "text"])
def test_edited_endpoints_are_what_the_host_returns(host, batch_for, kind, name):
    b = host(kind)
    batch = batch_for(b)
    pooled, embed = (r.x for r in b.read(batch, [f"{name}.pooled", f"{name}.embed"]))
    which = 0 if name == "image" else 1
    with b.edit(f"{name}.embed", lambda x: -2 * x):
        torch.testing.assert_close(encode(b, batch)[which], -2 * embed)
        torch.testing.assert_close(b.capture(batch).x[name], -2 * embed)
        method = getattr(b.model, f"encode_{name}")
        data = batch.images if name == "image" else batch.texts
        torch.testing.assert_close(method(data, normalize=True), F.normalize(-2 * embed, dim=-1))
    delta = torch.randn(pooled.shape[1], generator=torch.Generator().manual_seed(1))
    want = project(b, name, pooled + delta)
    with b.edit(f"{name}.pooled", lambda x: x + delta):
        torch.testing.assert_close(encode(b, batch)[which], want, atol=1e-5, rtol=1e-4)
        seen = b.read(batch, [f"{name}.pooled"])[0].x
        torch.testing.assert_close(seen, pooled + delta, atol=1e-6, rtol=1e-5)
    assert (want - embed).norm() > 0.1 * embed.norm()
    assert hooks(b) == 0 and not shadows(b)


def test_constant_at_the_last_image_block_against_a_manual_forward(host, batch_for):
    b = host("vit")
    batch = batch_for(b)
    v, last = b.model.visual, vit_states(b.model, batch.images)[-1]
    c = torch.linspace(-1, 1, 32)
    for policy, rows in (("all", slice(None)), ("cls", slice(0, 1)), ("patches", slice(1, None))):
        x = last.clone()
        x[:, rows] += c
        with b.edit(f"visual.transformer.resblocks.2[{policy}]", lambda x: x + c):
            got = b.encode_image(batch.images)
        torch.testing.assert_close(got, v._pool(x)[0] @ v.proj)
        changed = not torch.allclose(got, b.encode_image(batch.images))
        assert changed == (policy != "patches")  # the class token is what is pooled


def test_constant_at_one_text_token_against_a_manual_forward(host, batch_for):
    b = host("vit")
    batch, m = batch_for(b), b.model
    c, eos = torch.linspace(-1, 1, 24), batch.texts.argmax(1)
    x = text_states(m, batch.texts)[1].clone()
    x[torch.arange(4), eos] += c
    for block in m.transformer.resblocks[1:]:
        x = block(x, attn_mask=m.attn_mask)
    want = m.ln_final(x)[torch.arange(4), eos] @ m.text_projection
    with b.edit("transformer.resblocks.0[eos]", lambda x: x + c):
        torch.testing.assert_close(b.encode_text(batch.texts), want)
        torch.testing.assert_close(m.encode_text(batch.texts), want)  # also when the host is called directly


def test_removing_an_update_skips_the_block(host, batch_for):
    b = host("vit")
    batch, v = batch_for(b), b.model.visual
    s = vit_states(b.model, batch.images)
    with b.edit("visual.transformer.resblocks.1:update", torch.zeros_like):
        got = b.encode_image(batch.images)
    want = v._pool(v.transformer.resblocks[2](s[1]))[0] @ v.proj
    torch.testing.assert_close(got, want)


def test_input_of_a_block_is_the_output_of_the_one_before(host, batch_for):
    b = host("custom")
    batch, results = batch_for(b), []
    for site in ("text.transformer.resblocks.1:in[mask]", "text.transformer.resblocks.0:out[mask]"):
        with b.edit(site, lambda x: x * 1.5):
            results.append(b.encode_text(batch.texts))
    assert torch.equal(*results) and not torch.allclose(results[0], b.encode_text(batch.texts))


def test_map_edit_reaches_the_next_layer(host, batch_for):
    b = host("resnet")
    batch, v = batch_for(b), b.model.visual
    x = v.layer2(v.layer1(v.stem(batch.images)))
    scale = torch.linspace(0.5, 1.5, x.shape[1])
    want = v.attnpool(v.layer4(v.layer3(x * scale[:, None, None])))
    with b.edit("visual.layer2", lambda rows: rows * scale):
        torch.testing.assert_close(b.encode_image(batch.images), want)


def test_edits_compose_in_order_and_capture_sees_them(host, batch_for):
    b = host("vit")
    batch = batch_for(b)
    x = b.capture(batch).x["image"]
    with b.edit("image.embed", lambda x: x + 1):
        with b.edit("image.embed", lambda x: x * 2):
            torch.testing.assert_close(b.capture(batch).x["image"], (x + 1) * 2)
        torch.testing.assert_close(b.capture(batch).x["image"], x + 1)


def test_a_probe_inside_an_edit_does_not_call_it(host, batch_for):
    b = host("custom")
    calls = []
    with b.edit("image.embed", lambda x: calls.append(len(x)) or x):
        b.site("visual.transformer.resblocks.0.mlp.c_fc:in")
        assert calls == []
        b.encode_image(batch_for(b).images)
    assert calls == [4]


@pytest.mark.parametrize("site", ["image.embed", "image.pooled", "visual.transformer.resblocks.0[patches]"])
def test_nothing_is_left_after_an_exception(host, batch_for, site):
    b = host("vit")
    batch = batch_for(b)
    plain = b.encode_image(batch.images)

    def broken(x):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), b.edit(site, broken):
        b.encode_image(batch.images)
    with pytest.raises(ZeroDivisionError), b.edit(site, broken):
        b.capture(batch)
    with pytest.raises(InputError, match=r"\(3, 32\)"), b.edit("visual.transformer.resblocks.0[cls]", lambda x: x[:3]):
        b.encode_image(batch.images)
    assert hooks(b) == 0 and not shadows(b)
    assert torch.equal(b.encode_image(batch.images), plain)


def test_gradients_flow_through_an_edit_of_the_bare_model(host, batch_for):
    b = host("vit")
    batch = batch_for(b)
    delta = torch.zeros(32, requires_grad=True)
    with b.edit("visual.transformer.resblocks.1[patches]", lambda x: x + delta):
        b.model.encode_image(batch.images).sum().backward()
    assert delta.grad.norm() > 0 and all(p.grad is None for p in b.model.parameters())
