"""Attachments on open_clip hosts: what is refused, order, cleaning up, and VS2."""

import warnings
from dataclasses import replace

import pytest
import torch

from mmsae import SAE, InputError
from mmsae.hosts import load_host
from mmsae.sae import TopK
from mmsae.steering import Edit, FeatureStats, Intervention, active_sites, attach
from mmsae.steering.methods.zero_shot_vs2 import vs2, zero_shot_steered
from mmsae.types import ImageTextBatch
from tests.helpers.encoders import CAPTIONS, MODELS, save_local
from tests.helpers.steer_saes import K, make

pytestmark = pytest.mark.filterwarnings("ignore:.*dx")  # random SAEs push far
BLOCK = "visual.transformer.resblocks.1"


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    return load_host(save_local(tmp_path_factory.mktemp("clip") / "vit", MODELS["vit"]))


@pytest.fixture(scope="module")
def images(host):
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def sae_at(on, spec, seed=0, **site):
    at = replace(on.site(spec), **site)
    torch.manual_seed(seed)
    sae = SAE(at.width, 64, modalities=[at.modality], selector=TopK(K)).eval().requires_grad_(False)
    sae.sites = {at.modality: at}
    return sae


def raw(edit, **more):
    return Intervention(edit, unit="raw", **more)


def hooks(host):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in host.model.modules())


PUSH = raw(Edit.add([3, 7], 4.0))


SITES = [f"{BLOCK}:out[patches]", f"{BLOCK}:update", "image.pooled", "image.embed", "text.embed"]


@pytest.mark.parametrize("spec", [*SITES, "transformer.resblocks.1:out"])
def test_every_kind_of_site(host, images, spec):
    sae = sae_at(host, spec)
    ids = host.tokenize(CAPTIONS)

    def run():
        return host.encode_text(ids) if host.site(spec).modality == "text" else host.encode_image(images)

    clean = run()
    with attach(host, {spec: (sae, raw(Edit.scale(3, 1.0)))}) as log:
        assert torch.equal(run(), clean)
        assert log.share == 0 and log[0].calls == 1
    with attach(host, {spec: (sae, PUSH)}) as log:
        (at,) = sae.sites.values()
        assert active_sites(host) == [f"{at.module}:{at.io}[{at.tokens}]"]
        steered = run()
    assert not torch.equal(steered, clean) and log.share > 0 and log.relative > 0
    assert torch.equal(run(), clean) and active_sites(host) == [] and hooks(host) == 0
    if spec == "image.embed":
        assert torch.equal(steered, PUSH.apply(sae, clean))


def test_text_is_steered_at_content_by_default(host):
    spec, ids = "transformer.resblocks.1:out[all]", host.tokenize(CAPTIONS)
    sae = sae_at(host, spec)
    words = (~host._text_marks(ids, 0).special).double().mean()
    for tokens, share in ((None, words), ("all", 1.0), ("eos", 4 / ids.numel())):
        with attach(host, {spec: (sae, raw(Edit.add(3, 4.0), tokens=tokens))}) as log:
            host.encode_text(ids)
        assert log.share == pytest.approx(float(share))


def test_hooks_are_gone_after_an_exception_and_generations_repeat(host, images):  # T12
    spec = f"{BLOCK}:out[patches]"
    sae, other = sae_at(host, spec), sae_at(host, "image.embed", 1)
    clean = host.encode_image(images)
    with pytest.raises(RuntimeError, match="boom"):
        with attach(host, {spec: (sae, PUSH), "image.embed": (other, PUSH)}):
            assert len(active_sites(host)) == 2
            raise RuntimeError("boom")
    assert active_sites(host) == [] and hooks(host) == 0 and torch.equal(host.encode_image(images), clean)
    with attach(host, {spec: (sae, PUSH)}):
        once, again = host.encode_image(images), host.encode_image(images)
        with attach(host, {"image.embed": (other, PUSH)}):
            both = host.encode_image(images)
        assert torch.equal(host.encode_image(images), once) and len(active_sites(host)) == 1
    assert torch.equal(once, again) and torch.equal(both, PUSH.apply(other, once))
    bad = raw(Edit.add(3, 1.0), tokens="eos")  # refused inside the forward pass
    with pytest.raises(InputError, match="eos"):
        with attach(host, {"image.embed": (other, bad)}):
            host.encode_image(images)
    assert active_sites(host) == [] and torch.equal(host.encode_image(images), clean)


def test_order_of_registration_holds(host, images):
    sae = sae_at(host, "image.embed")
    clean = host.encode_image(images)
    first, second = raw(Edit.set(3, 9.0)), raw(Edit.ablate(3) + Edit.scale(3, 1.0))
    with attach(host, [("image.embed", (sae, first)), ("image.embed", (sae, second))]) as log:
        listed = host.encode_image(images)
    with attach(host, {"image.embed": (sae, first)}), attach(host, {"image.embed": (sae, second)}):
        nested = host.encode_image(images)
    want = second.apply(sae, first.apply(sae, clean))
    assert torch.equal(listed, want) and torch.equal(nested, want) and len(log) == 2 and len(log.table()) == 2
    assert not torch.allclose(want, first.apply(sae, second.apply(sae, clean)), atol=1e-3)


def test_refused(host):
    out, update, inp = (f"{BLOCK}:{io}" for io in ("out", "update", "in"))
    other_block = "visual.transformer.resblocks.0:out"
    text = sae_at(host, "text.embed")
    text.modalities = ("text", "sound")
    cases = [
        (out, sae_at(host, update), PUSH, {"allow_other_site": True}, "a different signal"),
        (update, sae_at(host, out), PUSH, {}, "a different signal"),
        (out, sae_at(host, out), raw(Edit.set(64, 1.0)), {}, "feature 64 is not one of the SAE's 64 latents"),
        (out, sae_at(host, out), Intervention(Edit.set(1, 1.0)), {}, "needs statistics"),
        (other_block, sae_at(host, out), PUSH, {}, "trained at .*resblocks.1:out, not at .*resblocks.0:out"),
        (inp, sae_at(host, out), PUSH, {}, r"not at .*:in"),
        (out, sae_at(host, out, host="f" * 32), PUSH, {}, "trained on .* of host ffffffffffff.*, not on host"),
        ("image.embed", sae_at(host, out), PUSH, {"allow_other_site": True}, "has width 16, the SAE takes 32"),
        ("image.embed", text, PUSH, {}, "is of image, the SAE codes text, sound"),
        ("visual.nothing", sae_at(host, out), PUSH, {}, "no module"),
    ]
    for site, sae, iv, options, says in cases:
        with pytest.raises(InputError, match=says) as e:
            with attach(host, {site: (sae, iv)}, **options):
                raise AssertionError("attached")
        assert "\n" not in str(e.value) and active_sites(host) == [] and hooks(host) == 0


def test_other_sites_on_request_and_saes_without_a_site(host, images):
    spec = f"{BLOCK}:out"
    for at, sae in (
        (f"{BLOCK}:in", sae_at(host, spec)),
        ("visual.transformer.resblocks.0:out", sae_at(host, spec, host="f" * 32)),
    ):
        with attach(host, {at: (sae, PUSH)}, allow_other_site=True) as log:
            host.encode_image(images)
        assert log.share == 1
    imported = SAE(32, 64, modalities=["image"], selector=TopK(K)).eval().requires_grad_(False)
    with attach(host, {spec: (imported, PUSH)}) as log:
        host.encode_image(images)
    assert log.share == 1 and imported.sites == {}


def test_a_site_that_nothing_reads_is_refused_by_the_host(host, monkeypatch):
    def check_consumed(site):
        raise InputError(f"site {site.module} lies after the last block that is read.")

    monkeypatch.setattr(host, "check_consumed", check_consumed, raising=False)
    monkeypatch.setattr(host, "generate", lambda *_: None, raising=False)
    with pytest.raises(InputError, match="after the last block"):
        with attach(host, {"image.embed": (sae_at(host, "image.embed"), PUSH)}):
            raise AssertionError("attached")


def test_a_host_without_steps_refuses_their_gate(host, images):
    sae = sae_at(host, "image.embed")
    with pytest.raises(InputError, match="outside of a generation's steps"):
        with attach(host, {"image.embed": (sae, raw(Edit.add(1, 1.0), steps=(0, 2)))}):
            host.encode_image(images)


def test_a_window_of_steps_is_told_to_hosts_with_a_clock(host, images, monkeypatch):
    told = []
    edit = host.edit

    def clocked(site, fn, *, where=False, steps=None):
        told.append(steps)
        return edit(site, fn, where=where)

    monkeypatch.setattr(host, "edit", clocked)
    for method in ("generate", "check_consumed"):  # of hosts with a clock
        monkeypatch.setattr(host, method, lambda *_: None, raising=False)
    sae = sae_at(host, "image.embed")
    for steps in ((0, 2), None):
        with attach(host, {"image.embed": (sae, raw(Edit.add(1, 1.0), steps=steps))}) as log:
            host.encode_image(images)  # the host has decided: the gate does not ask again
        assert log.share == 1
    assert told == [(0, 2), None]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_hosts(tmp_path, dtype, images):
    host = load_host(save_local(tmp_path / "vit", MODELS["vit"]))
    host.model.visual.transformer.resblocks.to(dtype)
    host.model.visual.transformer.register_forward_pre_hook(lambda m, a: (a[0].to(dtype), *a[1:]))
    host.model.visual.transformer.register_forward_hook(lambda m, a, out: out.float())
    spec, seen = f"{BLOCK}:out[patches]", []
    sae = sae_at(host, spec)
    host.model.get_submodule(BLOCK).register_forward_hook(lambda m, a, out: seen.append(out))
    host.encode_image(images)
    gate = {"tokens": [2, 5]}
    with attach(host, {spec: (sae, raw(Edit.scale(3, 1.0)))}):
        host.model.get_submodule(BLOCK).register_forward_hook(lambda m, a, out: seen.append(out))
        host.encode_image(images)
    assert seen[1] is seen[2]  # T1: one object before and after the edit's hook
    seen.clear()
    with attach(host, {spec: (sae, raw(Edit.add(3, 4.0), **gate))}) as log:
        host.model.get_submodule(BLOCK).register_forward_hook(lambda m, a, out: seen.append(out))
        host.encode_image(images)
    before, after = seen[0], seen[-1]
    changed = (before != after).any(2)
    assert after.dtype == dtype and changed[:, [2, 5]].all() and changed.sum() == 8  # T8, bit-exactly
    assert log[0].relative > 0 and log.share == pytest.approx(2 / 16)


def test_large_changes_are_warned_about(host, images):
    sae = sae_at(host, "image.embed")
    for gamma, count in ((5.0, 1), (0.1, 0)):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            with attach(host, {"image.embed": (sae, Intervention(Edit.add(1, gamma), unit="rel_norm"))}):
                host.encode_image(images)
        assert len([w for w in seen if "|dx|" in str(w.message)]) == count


# VS2


def test_vs2_amplifies_the_samples_own_features(host, images):
    for spec in ("image.embed", f"{BLOCK}:out[patches]"):
        sae = sae_at(host, spec)
        classes = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
        got = zero_shot_steered(host, [images[:3], images[3:]], classes, sae, vs2(3.0, guard=None), spec)
        clean = host.encode_image(images)
        assert torch.equal(got.clean, torch.nn.functional.cosine_similarity(clean[:, None], classes, dim=-1).argmax(1))
        assert got.share == 1 and got.relative > 0
        same = zero_shot_steered(host, [images], classes, sae, vs2(1.0, guard=None), spec)
        assert torch.equal(same.clean, same.steered) and same.share == 0
    none = zero_shot_steered(host, [images], classes, sae, vs2(3.0, guard=0.0), spec)
    assert torch.equal(none.clean, none.steered) and none.share == 0
    assert got.accuracy(got.clean)[0] == 1.0


def test_vs2_is_the_formula():
    for name in ("topk", "paired_topk"):
        sae, x = make(name)
        codes = sae.encode(x, "image")
        more = codes._replace(values=codes.values * 0.5)
        none = codes._replace(values=codes.values * 0)
        want = x + sae.decode(more, "image") - sae.decode(none, "image")
        assert torch.allclose(vs2(1.5, guard=None).apply(sae, x, "image"), want, atol=1e-5)


def test_statistics_travel_to_the_host(host, images):
    spec = f"{BLOCK}:out[patches]"
    sae = sae_at(host, spec)
    batch = ImageTextBatch(images, None, list("abcd"), [""] * 4, list("abcd"), ["s"] * 4)
    stats = FeatureStats.collect(sae, [host.capture(batch, [spec])])
    i = int(stats.mean_active.argmax())
    with attach(host, {spec: (sae, Intervention(Edit.add(i, 2.0), stats=stats))}):
        steered = host.read(batch, [spec.replace("1:out", "2:in")])[0].x
    clean = host.read(batch, [spec])[0].x
    want = clean + 2 * stats.mean_active[i] * sae.dictionary("image").weight[i]
    assert torch.allclose(steered, want, atol=1e-5)
