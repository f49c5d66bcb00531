"""What is read from open_clip hosts, against the host's own methods and hand-written forward passes."""

import pickle
from dataclasses import replace

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from mmsae.hosts import OpenCLIPHost, load_host
from mmsae.types import ImageTextBatch, InputError
from tests.helpers.encoders import CAPTIONS, MODELS, PREPROCESS, project, save_local, text_states, vit_states

KINDS = list(MODELS)


@pytest.mark.parametrize("kind", KINDS)
def test_embed_endpoints_are_the_hosts_own_raw_embeddings(host, batch_for, kind):
    b = host(kind)
    batch = batch_for(b)
    image, text = b.model.encode_image(batch.images, normalize=False), b.model.encode_text(batch.texts, normalize=False)
    tokens = b.capture(batch)
    assert torch.equal(tokens.x["image"], image) and torch.equal(tokens.x["text"], text)
    assert torch.equal(b.encode_image(batch.images), image) and torch.equal(b.encode_text(batch.texts), text)
    assert (image.norm(dim=-1) - 1).abs().min() > 1e-3  # raw
    assert tokens.paired() and tokens.item["image"].tolist() == [0, 1, 2, 3]
    assert tokens.position is None and tokens.special is None
    assert tokens.uids == list("wxyz") and tokens.faults == batch.faults
    assert not image.requires_grad and not b.model.training
    assert {s.width for s in b.default_sites().values()} == {16}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["image", "text"])
def test_pooled_times_projection_is_embed(host, batch_for, kind, name):
    b = host(kind)
    pooled, embed = b.read(batch_for(b), [f"{name}.pooled", f"{name}.embed"])
    assert pooled.x.shape == (4, b.width(f"{name}.pooled"))
    torch.testing.assert_close(project(b, name, pooled.x), embed.x, atol=1e-5, rtol=1e-5)


def test_block_states_and_updates_of_the_image_tower(host, batch_for):
    b = host("vit")
    batch = batch_for(b)
    s = vit_states(b.model, batch.images)
    at = "visual.transformer.resblocks.1"
    got = b.read(batch, [f"{at}:in", f"{at}:out", f"{at}:update", f"{at}:out[cls]", f"{at}:out[patches]"])
    assert torch.equal(got[0].x, s[1].flatten(0, 1)) and torch.equal(got[1].x, s[2].flatten(0, 1))
    torch.testing.assert_close(got[2].x, (s[2] - s[1]).flatten(0, 1))
    assert torch.equal(got[3].x, s[2][:, 0]) and torch.equal(got[4].x, s[2][:, 1:].flatten(0, 1))
    assert got[4].item.tolist() == [i for i in range(4) for _ in range(16)]
    assert got[4].position.tolist() == list(range(1, 17)) * 4 and not got[4].special.any()
    assert got[3].special.all() and got[1].special.view(4, 17).sum(0).tolist() == [4] + [0] * 16
    pooled = b.capture(batch, {"image": f"{at}[pooled]"})
    torch.testing.assert_close(pooled.x["image"], s[2][:, 1:].mean(1))
    assert pooled.position is None


@pytest.mark.parametrize("kind,prefix", [("vit", ""), ("custom", "text.")])
def test_token_policies_of_the_text_tower(host, batch_for, kind, prefix):
    b = host(kind)
    batch = batch_for(b)
    x = text_states(b.model, batch.texts)[2]
    eos, length = batch.texts.argmax(1), [5, 9, 4, 2]
    at = f"{prefix}transformer.resblocks.1"
    last, mask, every = b.read(batch, [f"{at}[eos]", f"{at}[mask]", at])
    assert eos.tolist() == [n - 1 for n in length]
    assert torch.equal(last.x, x[torch.arange(4), eos]) and last.position.tolist() == eos.tolist()
    assert torch.equal(mask.x, torch.cat([x[i, :n] for i, n in enumerate(length)]))
    assert mask.special.sum() == 8  # BOS and EOS; <unk> stands for a word
    assert len(every.x) == 40 and every.special.sum() == 40 - (sum(length) - 8)
    both = b.capture(batch, {"image": "visual.transformer.resblocks.0[cls]", "text": f"{at}[mask]"})
    assert both.item["image"].tolist() == [0, 1, 2, 3] and len(both.item["text"]) == sum(length)


def test_eos_is_the_token_that_the_host_pools(host, batch_for):
    b = host("timm_vit")  # pools the last place; the text ends before its padding
    rows = b.read(batch_for(b), ["text.transformer.resblocks.2[eos]", "text.transformer.resblocks.2[mask]"])
    assert rows[0].position.tolist() == [9] * 4 and len(rows[1].x) == 5 + 9 + 4 + 2
    c = host("coca")  # appends a class token and pools that
    rows = c.read(batch_for(c), [f"text.transformer.resblocks.2[{p}]" for p in ("eos", "cls", "mask", "all")])
    assert rows[0].position.tolist() == rows[1].position.tolist() == [10] * 4 and len(rows[3].x) == 44
    assert rows[0].special.all() and len(rows[2].x) == 5 + 9 + 4 + 2 + 4
    torch.testing.assert_close(c.model.text.ln_final(rows[0].x), c.read(batch_for(c), ["text.pooled"])[0].x)


def test_length_first_transformers_give_the_same_rows(host, batch_for, tmp_path):
    b = host("vit")
    other = load_host(save_local(tmp_path / "lnd", MODELS["vit"]))
    for tower in (other.model.visual.transformer, other.model.transformer):
        tower.batch_first = False
        for block in tower.resblocks:
            block.attn.batch_first = False
    sites = ["visual.transformer.resblocks.1[patches]", "transformer.resblocks.1.attn[mask]", "transformer[eos]"]
    for a, c in zip(b.read(batch_for(b), sites), other.read(batch_for(b), sites), strict=True):
        torch.testing.assert_close(a.x, c.x)
        assert torch.equal(a.item, c.item) and torch.equal(a.position, c.position)
    assert other.site(sites[0]).same(b.site(sites[0]))


def test_maps_are_read_before_the_host_overwrites_them(host, batch_for):
    b = host("resnet")
    batch, seen = batch_for(b), {}
    block = b.model.visual.layer1[0]
    handles = [  # bn3 is followed by an in-place sum, act1 works in place on its input
        m.register_forward_hook(lambda m, a, o, n=n: seen.__setitem__(n, o.clone()))
        for n, m in {"bn3": block.bn3, "bn1": b.model.visual.bn1, "act1": b.model.visual.act1}.items()
    ]
    b.model.visual(batch.images)
    for h in handles:
        h.remove()
    names = ["visual.layer1.0.bn3", "visual.bn1[patches]", "visual.act1:update", "visual.layer4"]
    bn3, bn1, update, _ = b.read(batch, names)
    assert torch.equal(bn3.x, seen["bn3"].flatten(2).transpose(1, 2).flatten(0, 1))
    assert torch.equal(bn1.x, seen["bn1"].flatten(2).transpose(1, 2).flatten(0, 1))
    assert torch.equal(update.x, (seen["act1"] - seen["bn1"]).flatten(2).transpose(1, 2).flatten(0, 1))
    assert b.width("visual.layer4") == 256 and not bn3.special.any()


def test_timm_tower_inside_clip(host, batch_for):
    b = host("timm_resnet")
    batch = batch_for(b)
    trunk = b.model.visual.trunk
    maps = trunk.forward_features(batch.images)
    got = b.capture(batch, ["visual.trunk.layer4[patches]"]).x["image"]
    assert torch.equal(got, maps.flatten(2).transpose(1, 2).flatten(0, 1))
    v = host("timm_vit")
    rows = v.read(batch_for(v), ["visual.trunk.patch_embed", "visual.trunk.blocks.0[patches]", "visual.trunk.blocks.0"])
    assert [len(r.x) for r in rows] == [4 * 100, 4 * 100, 4 * 101] and not rows[0].special.any()
    with pytest.raises(InputError, match="cls"):
        v.read(batch_for(v), ["visual.trunk.patch_embed[cls]"])


def test_reading_stops_when_everything_is_read(host, batch_for):
    b = host("vit")
    b.site("visual.transformer.resblocks.0")  # its probe runs the whole host
    ran = []
    handles = [blk.register_forward_hook(lambda *_: ran.append(1)) for blk in b.model.visual.transformer.resblocks]
    b.capture(batch_for(b), ["visual.transformer.resblocks.0"])
    for h in handles:
        h.remove()
    assert len(ran) == 1


@pytest.mark.parametrize(
    "site,why",
    [
        ("visual.transformer.resblock.1", "near matches: .*visual.transformer.resblocks.1"),
        ("visual.proj", "no module or endpoint"),
        ("transformer.resblocks.0.attn.out_proj", "never called"),
        ("visual.conv1:update", r"io 'update' when its input has shape \(1, 3, 32, 32\)"),
        ("token_embedding:in", "int64"),
        ("visual.transformer.resblocks.0:inside", "in, out, update"),
        ("image.embed:in", "io 'out' only"),
        ("image.embed[patches]", "one row per item"),
        ("text.embed[first]", "not one of"),
        ("visual/blocks", "form"),
        ("transformer[cls]", "class token"),
    ],
)
def test_bad_sites_are_named(host, site, why):
    with pytest.raises(InputError, match=why):
        host("vit").site(site)


def test_batches_that_lack_a_modality(host, batch_for):
    b = host("vit")
    batch = batch_for(b)
    assert list(b.capture(batch._replace(texts=None)).x) == ["image"]
    with pytest.raises(InputError, match="texts of a batch that has none"):
        b.capture(batch._replace(texts=None), ["text.embed"])
    with pytest.raises(InputError, match="one site per modality"):
        b.capture(batch, ["image.embed", "image.pooled"])


def test_sites_of_other_hosts_are_refused(host):
    a, b = host("vit"), host("custom")
    site = a.site("visual.transformer.resblocks.1:in[patches]")
    assert a.site(site) == site
    with pytest.raises(InputError) as e:
        b.site(site)
    assert a.fingerprint in str(e.value) and b.fingerprint in str(e.value)
    moved = b.check_site(site, allow_other_site=True)
    assert moved.host == b.fingerprint and moved.module == site.module and moved.width == site.width
    nameless = replace(site, host="", width=0, hint="")
    assert b.check_site(nameless) == moved
    with pytest.raises(InputError, match=r"width 48.*32"):
        b.check_site(replace(site, width=48), allow_other_site=True)
    with pytest.raises(InputError, match=r"modality text.*image"):
        b.check_site(replace(site, modality="text"), allow_other_site=True)


def test_the_transform_is_the_hosts_own(host):
    b = host("vit")
    grey = Image.fromarray(np.full((40, 50, 3), 128, np.uint8))
    x = b.transform()(grey)
    want = (128 / 255 - torch.tensor(PREPROCESS["mean"])) / torch.tensor(PREPROCESS["std"])
    torch.testing.assert_close(x, want[:, None, None].expand(3, 32, 32))
    _, train, val = open_clip.create_model_and_transforms(b.hint)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8))
    assert torch.equal(val(noise), b.transform()(noise))
    assert repr(train) == repr(b.transform(train=True)) != repr(val)


def test_the_tokenizer_is_the_hosts_own_and_says_what_it_truncates(host):
    b = host("vit")
    assert torch.equal(b.tokenize(CAPTIONS), open_clip.get_tokenizer(b.hint)(CAPTIONS))
    texts = [*CAPTIONS, " ".join(["red"] * 8), " ".join(["red"] * 9)]  # 8 words, BOS and EOS make 10
    assert b.too_long(texts) == [False] * 5 + [True] and b.context_length == 10
    assert b.tokenize(texts)[-1, -1] == b.tokenize.eos_id() == b.tokenize(texts).max()
    copy = pickle.loads(pickle.dumps(b.tokenize))  # workers get one
    assert torch.equal(copy(texts), b.tokenize(texts)) and len(pickle.dumps(b.tokenize)) < 50_000


def test_openais_byte_pair_tokenizer(tmp_path):
    text = {k: v for k, v in MODELS["vit"]["text_cfg"].items() if k != "hf_tokenizer_name"}
    config = {**MODELS["vit"], "text_cfg": {**text, "vocab_size": 49408}}
    model = open_clip.CLIP(**config)
    open_clip.model.set_model_preprocess_cfg(model, {**PREPROCESS, "size": 32})
    b = OpenCLIPHost(model, config, lambda: open_clip.SimpleTokenizer(), "mine")
    texts = ["hi!!!", "one two three four five six seven eight", "one two three four five six seven eight nine"]
    assert b.too_long(texts) == [False, False, True]
    batch = ImageTextBatch(None, b.tokenize(texts), None, texts, [], [])
    rows = b.capture(batch, ["transformer.resblocks.0[mask]"])  # id 0 is both '!' and padding
    assert rows.item["text"].bincount().tolist() == [len(open_clip.tokenizer._tokenizer.encode("hi!!!")) + 2, 10, 10]
    assert rows.special["text"].sum() == 6


def test_half_precision_is_autocast_and_float32_outside(host, batch_for):
    b = host("vit")
    batch = batch_for(b)
    half = load_host(b.hint, precision="bf16")
    assert half.fingerprint == b.fingerprint
    sites = ["image.embed", "text.embed"]
    for a, c in zip(b.read(batch, sites), half.read(batch, sites), strict=True):
        assert c.x.dtype == torch.float32 and not torch.equal(a.x, c.x)
        assert (a.x - c.x).norm() < 0.05 * a.x.norm()
    with torch.autocast("cpu", torch.bfloat16):  # a trainer's autocast does not reach an fp32 host
        assert torch.equal(b.capture(batch).x["image"], b.encode_image(batch.images))
    with pytest.raises(InputError, match="fp8"):
        load_host(b.hint, precision="fp8")


def test_logit_scale(host):
    b = host("vit")
    assert b.logit_scale == pytest.approx(b.model.logit_scale.exp().item())


def test_a_text_without_words_where_the_end_token_pads(tmp_path):
    config = {**MODELS["timm_vit"], "text_cfg": {**MODELS["timm_vit"]["text_cfg"], "pool_type": "last"}}
    b = load_host(save_local(tmp_path / "a", config))
    eos, red, green = b.tokenize.eos_id(), 5, 6
    b.tokenize.pad_id = lambda: eos  # as SigLIP's tokenizer has it
    ids = torch.tensor([[red, green, *[eos] * 8], [red, *[eos] * 9], [eos] * 10, [red] * 10])
    batch = ImageTextBatch(None, ids, list("wxyz"), CAPTIONS, list("0123"), ["s"] * 4)
    rows = b.read(batch, ["text.transformer.resblocks.0:out[mask]"])[0]
    assert [rows.position[rows.item == i].tolist() for i in range(4)] == [[0, 1, 2], [0, 1], [0], list(range(10))]


def test_images_that_are_not_square(tmp_path):
    config = {**MODELS["vit"], "vision_cfg": {**MODELS["vit"]["vision_cfg"], "image_size": [32, 64]}}
    name = save_local(tmp_path / "a", config)
    b = load_host(name)
    images = b.transform()(Image.new("RGB", (50, 40), "red"))[None]
    assert images.shape == (1, 3, 32, 64) and b.config()["preprocess"]["size"] == [32, 64]
    model, _, transform = open_clip.create_model_and_transforms(name)
    torch.testing.assert_close(b.encode_image(images), model.eval().encode_image(images))
    assert torch.equal(transform(Image.new("RGB", (50, 40), "red"))[None], images)
    batch = ImageTextBatch(images, None, ["x"], [""], ["0"], ["s"])
    assert len(b.read(batch, ["visual.transformer.resblocks.0:out[patches]"])[0].x) == 4 * 8
