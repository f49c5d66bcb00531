"""Encoders of transformers, against its own outputs, and CLIP against the same weights in open_clip."""

import json
import pickle

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
import transformers as t
from PIL import Image
from safetensors.torch import load_file, save_file

from mmsae.activations import extract
from mmsae.hosts import OpenCLIPHost, embed_width, host_modalities, load_host, named_host, parse, site_width
from mmsae.hosts.encoders.families import FAMILIES
from mmsae.info import describe
from mmsae.types import ImageTextBatch, InputError
from tests.helpers import lvlm
from tests.helpers import transformers as tiny
from tests.helpers.encoders import CAPTIONS, PREPROCESS
from tests.helpers.stores import make_shards

DUAL = [f for f, m in FAMILIES.items() if len(m) == 2]
HEADS = ["vit", "dinov2", "dinov2_with_registers", "beit", "convnext", "swin", "clip", "siglip", "siglip2"]
LAYERS = {  # second block of the image tower: what hidden_states[2] is
    "vit": "layers.1",
    "deit": "layers.1",
    "clip": "vision_model.encoder.layers.1",
    "metaclip_2": "vision_model.encoder.layers.1",
    "siglip": "vision_model.encoder.layers.1",
    "siglip2": "vision_model.encoder.layers.1",
    "clip_vision_model": "encoder.layers.1",
    "dinov2": "encoder.layer.1",
    "dinov2_with_registers": "encoder.layer.1",
}
OLDER = LAYERS | {"vit": "encoder.layer.1", "deit": "encoder.layer.1"}  # what transformers 5.6 calls them


def images(n=4, size=(60, 40)):
    g = np.random.default_rng(0)
    return [Image.fromarray(g.integers(0, 255, (size[1] + 8 * i, size[0], 3), dtype=np.uint8)) for i in range(n)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """``made(family, head) -> host``, once."""
    hosts, root = {}, tmp_path_factory.mktemp("hosts")

    def get(family, head=""):
        if (family, head) not in hosts:
            hosts[family, head] = load_host(tiny.save(root / (family + head), family, head))
        return hosts[family, head]

    return get


def batch(host, n=4):
    x = torch.stack([host.transform()(i) for i in images(n)])
    ids = host.tokenize(CAPTIONS[:n]) if host.tokenize else None
    return ImageTextBatch(x, ids, list("wxyz")[:n], CAPTIONS[:n], list("0123")[:n], ["s"] * n)


def arguments(host, n=4):
    """What the library's own processor makes of the same images, for the model itself."""
    return dict(host.processor(images(n), return_tensors="pt"))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_embedding_is_the_models_own(made, family):
    b = made(family)
    data = batch(b)
    with torch.no_grad():
        if family in DUAL:
            want = b.model.get_image_features(**arguments(b)).pooler_output
        else:
            out = b.model(**arguments(b))
            want = out.get("pooler_output")
            if want is None:  # neither ViT-MSN nor I-JEPA has a pooler, and I-JEPA no class token
                want = out.last_hidden_state.mean(1) if family == "ijepa" else out.last_hidden_state[:, 0]
    got = b.capture(data)
    torch.testing.assert_close(got.x["image"], want, atol=1e-6, rtol=1e-5)
    assert torch.equal(got.x["image"], b.encode_image(data.images)) and not got.x["image"].requires_grad
    assert b.modalities == host_modalities(b.hint) == FAMILIES[family]
    assert site_width(b.hint, "image.embed") == embed_width(b.hint) == want.shape[1] == b.width()
    assert site_width(b.hint, "image.pooled") == b.width("image.pooled")


@pytest.mark.parametrize("family", FAMILIES)
def test_an_edit_of_the_embedding_reaches_what_the_host_gives(made, family):
    b = made(family)
    data = batch(b)
    x = b.encode_image(data.images)
    with b.edit("image.embed", lambda x: x * 3):
        torch.testing.assert_close(b.encode_image(data.images), 3 * x)
        if family in DUAL:
            with torch.no_grad():
                torch.testing.assert_close(b.model.get_image_features(**arguments(b)).pooler_output, 3 * x)
    with b.edit("image.embed", lambda x: x):
        assert torch.equal(b.encode_image(data.images), x)
    assert torch.equal(b.encode_image(data.images), x)


@pytest.mark.parametrize("family", DUAL)
def test_text_embeddings_and_pairs_are_the_models_own(made, family):
    b = made(family)
    data = batch(b)
    words = b.tokenize.tokenizer.tokenizer(CAPTIONS, padding="max_length", max_length=10, return_tensors="pt")
    with torch.no_grad():
        text = b.model.get_text_features(input_ids=words["input_ids"]).pooler_output
        out = b.model(input_ids=words["input_ids"], **arguments(b))
    got = b.capture(data)
    assert torch.equal(data.texts, words["input_ids"]) and b.context_length == 10
    torch.testing.assert_close(got.x["text"], text, atol=1e-6, rtol=1e-5)
    cosines = F.normalize(got.x["image"], dim=1) @ F.normalize(got.x["text"], dim=1).T
    assert (b.logit_bias is None) == ("clip" in family)
    torch.testing.assert_close(
        b.logit_scale * cosines + (b.logit_bias or 0), out.logits_per_image, atol=1e-4, rtol=1e-4
    )
    assert set(b.objectives) == {"contrastive"}
    pooled, embed = b.read(data, ["text.pooled", "text.embed"])
    project = b.model.text_projection if hasattr(b.model, "text_projection") else b.model.text_model.head
    torch.testing.assert_close(project(pooled.x), embed.x)
    want = project(pooled.x + 1)
    with b.edit("text.pooled", lambda x: x + 1):
        torch.testing.assert_close(b.encode_text(data.texts), want)
    assert b.tokenize.too_long(["a red circle", "a " * 30]) == [False, True]


@pytest.mark.parametrize("family", LAYERS)
def test_tokens_of_a_block_are_the_models_hidden_states(made, family):
    b = made(family)
    names = dict(b.model.named_modules())
    data, at = batch(b), next(n for n in (LAYERS[family], OLDER[family]) if n in names)
    tower = getattr(b.model, "vision_model", b.model)
    with torch.no_grad():
        want = tower(**arguments(b), output_hidden_states=True).hidden_states[2]
    rows = b.read(data, [at])[0]
    torch.testing.assert_close(rows.x, want.flatten(0, 1), atol=1e-6, rtol=1e-5)
    prefix, patches = b.prefix("image")
    content = b.read(data, [f"{at}[patches]"])[0]
    assert torch.equal(content.x, rows.x[~rows.special]) and not content.special.any()
    if family != "siglip2":
        assert len(content.x) == 4 * patches and rows.special.sum() == 4 * prefix
    if prefix:
        torch.testing.assert_close(b.read(data, [f"{at}[cls]"])[0].x, want[:, 0], atol=1e-6, rtol=1e-5)
    else:
        with pytest.raises(InputError, match="needs a class token"):
            b.site(f"{at}[cls]")
    with torch.no_grad():  # an edit reaches what the host gives
        clean = b.encode_image(data.images)
        ramp = torch.linspace(-1, 1, 16)  # a scale would be normed away
        with b.edit(f"{at}[patches]", lambda x: x + ramp):
            moved = b.encode_image(data.images)
    assert (moved - clean).abs().amax(1).min() > 1e-4 and torch.equal(b.encode_image(data.images), clean)


@pytest.mark.parametrize("family", ["dinov2_with_registers", "dinov3_vit"])
def test_registers_are_special_and_no_patches(made, family):
    b = made(family)
    at = "encoder.layer.0" if family.startswith("dinov2") else "model.layer.0"
    at = at if family.startswith("dinov2") else next(n for n, m in b.model.named_modules() if n.endswith("layer.0"))
    every, only = b.read(batch(b), [at, f"{at}[patches]"])
    assert b.prefix("image") == (5, 16) and every.special.sum() == 20 and len(only.x) == 64
    assert torch.equal(only.x, every.x[~every.special]) and only.position.min() == 5


def test_token_policies_of_the_text_towers(made):
    length = [5, 9, 4, 2]
    b, s = made("clip"), made("siglip")
    at = "text_model.encoder.layers.1"
    last, mask, every = b.read(batch(b), [f"{at}[eos]", f"{at}[mask]", at])
    assert last.position.tolist() == [n - 1 for n in length] and len(mask.x) == sum(length)
    assert mask.special.sum() == 8 and every.special.sum() == 40 - (sum(length) - 8)
    last, mask = s.read(batch(s), [f"{at}[eos]", f"{at}[mask]"])  # SigLIP pools the last place
    assert last.position.tolist() == [9] * 4 and len(mask.x) == sum(length)
    x = made("clip").capture(batch(b), {"text": f"{at}[pooled]"}).x["text"]
    rows = every.x.view(4, 10, -1)
    torch.testing.assert_close(x, torch.stack([rows[i, :n].mean(0) for i, n in enumerate(length)]))


def test_padding_on_the_left_is_no_text(made):
    b = made("siglip")
    inner, at = b.tokenize.tokenizer.tokenizer, "text_model.encoder.layers.1"
    before, inner.padding_side = inner.padding_side, "left"
    try:
        ids = b.tokenize(CAPTIONS)
        mask, last = b.read(batch(b)._replace(texts=ids), [f"{at}[mask]", f"{at}[eos]"])
    finally:
        inner.padding_side = before
    assert ids[0, 0] == 0 and len(mask.x) == 5 + 9 + 4 + 2 and last.position.tolist() == [9] * 4
    assert mask.position[:5].tolist() == [5, 6, 7, 8, 9]


@pytest.mark.parametrize("legacy", [True, False])
def test_clips_pooled_token_by_the_old_rule_and_the_new_one(tmp_path, legacy):
    text = {**tiny.CLIP["text_config"], "eos_token_id": 2 if legacy else 17}
    b = load_host(tiny.save(tmp_path / "h", "clip", text_config=text))
    data = batch(b)
    last = b.read(data, ["text_model.final_layer_norm[eos]", "text.pooled"])
    torch.testing.assert_close(last[0].x, last[1].x)


def test_the_transform_is_the_processor_bit_by_bit_and_half_of_it_waits_for_the_device(made):
    for family in ("clip", "vit", "siglip"):
        b = made(family)
        for image in images(2):
            whole = b.processor(image, return_tensors="pt")["pixel_values"][0]
            assert torch.equal(b.transform()(image), whole) and whole.shape == (3, 32, 32)
            half = b.reading(["image"])["transform"](image)
            assert half.dtype == torch.uint8
            prepared = b.prepared(ImageTextBatch(half[None], None, ["0"], [""], ["0"], [""]))
            assert torch.equal(prepared.images[0], whole)
        assert pickle.loads(pickle.dumps(b.transform()))(images(1)[0]).shape == (3, 32, 32)
        with pytest.raises(InputError, match="image processor of its own"):
            b.unsized()


@pytest.mark.parametrize("family", HEADS)
def test_a_fine_tuned_classifier_is_read_where_it_looks(made, family):
    b = made(family, "ForImageClassification")
    data = batch(b)
    x = b.encode_image(data.images)
    weight, bias = b.classifier
    with torch.no_grad():
        logits = b.model(**arguments(b)).logits
        torch.testing.assert_close(x @ weight.T + bias, logits, atol=1e-5, rtol=1e-5)
        with b.edit("image.embed", lambda x: x * 2 + 1):
            torch.testing.assert_close(b.encode_image(data.images), x * 2 + 1)
            torch.testing.assert_close(b.model(**arguments(b)).logits, (x * 2 + 1) @ weight.T + bias)
    assert b.modalities == host_modalities(b.hint) == ("image",) and b.tokenize is None and b.logit_scale is None
    assert site_width(b.hint, "image.embed") == x.shape[1] and set(b.objectives) == {"classifier"}


def test_a_tower_with_a_projection(made):
    b = made("clip_vision_model", "VisionModelWithProjection")
    data = batch(b)
    with torch.no_grad():
        torch.testing.assert_close(b.encode_image(data.images), b.model(**arguments(b)).image_embeds)
    pooled, embed = b.read(data, ["image.pooled", "image.embed"])
    torch.testing.assert_close(b.model.visual_projection(pooled.x), embed.x)
    assert (pooled.x.shape[1], embed.x.shape[1]) == (16, 8)


def test_patches_of_any_grid_and_their_padding(made):
    b = made("siglip2")
    wide = [Image.new("RGB", (90, 30), (200, 10, 10)), Image.new("RGB", (31, 64), (10, 200, 10))]
    x = torch.stack([b.transform()(i) for i in wide])
    own = b.processor(wide, return_tensors="pt")
    counts = own["spatial_shapes"].prod(1)
    assert (counts < 16).any()  # one of them has padding
    with torch.no_grad():
        torch.testing.assert_close(b.encode_image(x), b.model.get_image_features(**own).pooler_output)
    data = ImageTextBatch(x, None, ["a", "b"], ["", ""], ["0", "1"], ["", ""])
    rows, every = b.read(data, ["vision_model.encoder.layers.0[patches]", "vision_model.encoder.layers.0"])
    assert torch.bincount(rows.item).tolist() == counts.tolist() and len(every.x) == 32
    assert (~every.special).sum() == counts.sum() and b.batch_size() == 256


def weights_for_open_clip(state):
    """CLIP's weights of transformers under open_clip's names."""
    out = {"logit_scale": state["logit_scale"]}
    for side, theirs in (("vision_model", "visual."), ("text_model", "")):
        for i in range(3):
            old, new = f"{side}.encoder.layers.{i}.", f"{theirs}transformer.resblocks.{i}."
            for kind in ("weight", "bias"):
                qkv = [state[f"{old}self_attn.{p}_proj.{kind}"] for p in "qkv"]
                out[f"{new}attn.in_proj_{kind}"] = torch.cat(qkv)
                names = {"attn.out_proj": "self_attn.out_proj", "ln_1": "layer_norm1", "ln_2": "layer_norm2"}
                names |= {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
                out |= {f"{new}{a}.{kind}": state[f"{old}{b}.{kind}"] for a, b in names.items()}
    v, x = "vision_model.", "text_model."
    norms = {
        "visual.ln_pre": f"{v}pre_layrnorm",
        "visual.ln_post": f"{v}post_layernorm",
        "ln_final": f"{x}final_layer_norm",
    }
    out |= {f"{a}.{k}": state[f"{b}.{k}"] for a, b in norms.items() for k in ("weight", "bias")}
    out["visual.class_embedding"] = state[f"{v}embeddings.class_embedding"]
    out["visual.positional_embedding"] = state[f"{v}embeddings.position_embedding.weight"]
    out["visual.conv1.weight"] = state[f"{v}embeddings.patch_embedding.weight"]
    out["token_embedding.weight"] = state[f"{x}embeddings.token_embedding.weight"]
    out["positional_embedding"] = state[f"{x}embeddings.position_embedding.weight"]
    out["visual.proj"], out["text_projection"] = state["visual_projection.weight"].T, state["text_projection.weight"].T
    return out


def test_clip_is_what_the_same_weights_are_in_open_clip(made):
    b = made("clip")
    vision = {"image_size": 32, "patch_size": 8, "width": 16, "head_width": 8, "layers": 3, "mlp_ratio": 2.0}
    text = {"context_length": 10, "vocab_size": 18, "width": 12, "heads": 2, "layers": 3, "mlp_ratio": 2.0}
    config = {"embed_dim": 8, "vision_cfg": vision, "text_cfg": text, "quick_gelu": True}
    model = open_clip.CLIP(**config)
    missing = model.load_state_dict(weights_for_open_clip(b.model.state_dict()), strict=False).missing_keys
    assert missing in ([], ["attn_mask"])
    model.visual.preprocess_cfg = {**PREPROCESS, "size": 32, "mode": "RGB", "fill_color": 0}
    other, data = OpenCLIPHost(model, config, lambda: None, "mine"), batch(b)
    pairs = {
        "image.embed": "image.embed",
        "text.embed": "text.embed",
        "image.pooled": "image.pooled",
        "text.pooled": "text.pooled",
        "vision_model.encoder.layers.1[patches]": "visual.transformer.resblocks.1[patches]",
        "vision_model.encoder.layers.2[cls]": "visual.transformer.resblocks.2[cls]",
        "text_model.encoder.layers.1:update": "transformer.resblocks.1:update",
    }
    for ours, theirs in pairs.items():
        a, c = b.read(data, [ours])[0], other.read(data, [theirs])[0]
        torch.testing.assert_close(a.x, c.x, atol=1e-5, rtol=1e-4)
        assert torch.equal(a.item, c.item)
    assert b.logit_scale == pytest.approx(other.logit_scale)


def test_a_folder_and_its_copy_are_the_same_host_and_hints_load_again(tmp_path):
    name = tiny.save(tmp_path / "a", "clip")
    a = load_host(name)
    other = load_host(tiny.save(tmp_path / "b", "clip"))
    assert a.fingerprint == other.fingerprint and a.hint == name and load_host(a.site("image.embed").hint)
    assert load_host(tiny.save(tmp_path / "c", "clip", seed=1)).fingerprint != a.fingerprint
    path = tmp_path / "b" / "preprocessor_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "image_mean": [0.1, 0.1, 0.1]}))
    assert load_host(other.hint).fingerprint != a.fingerprint
    half = load_host(name, dtype="bf16")
    assert half.hint == f'{name} {{"dtype": "bf16"}}' and half.model.dtype == torch.bfloat16
    assert half.encode_image(batch(half).images).dtype == torch.float32
    cast = load_host(name, precision="bf16")
    assert cast.fingerprint == a.fingerprint
    x, y = a.encode_image(batch(a).images), cast.encode_image(batch(a).images)
    assert not torch.equal(x, y) and F.cosine_similarity(x, y).min() > 0.99
    sites = {"image": half.site("image.embed")}
    assert load_host(named_host("", sites)).fingerprint == half.fingerprint


def test_names_of_folders_say_what_they_are(tmp_path):
    right = tiny.save(tmp_path / "clip", "clip")
    for wrong in (f"lvlm:{tmp_path / 'clip'}", str(tmp_path / "clip"), f"timm:local-dir:{tmp_path / 'clip'}"):
        with pytest.raises(InputError, match=f"write {right}"):
            parse(wrong)
    llava = lvlm.llava(tmp_path / "llava")
    with pytest.raises(InputError, match=f"write {llava}"):
        parse(f"transformers:{tmp_path / 'llava'}")
    with pytest.raises(InputError, match="names nothing"):
        parse("transformers:")
    with pytest.raises(InputError, match="cannot be loaded"):
        load_host("transformers:nobody/nothing", local_files_only=True)
    found = describe(tmp_path / "clip")
    assert found["architecture"] == "CLIPModel" and set(found["sites"]) == {"image", "text"}


def test_families_that_are_no_encoders_are_refused_by_name(tmp_path):
    config = t.ViTMAEConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    t.ViTMAEModel(config).save_pretrained(tmp_path / "mae")
    tiny.image_processor("vit").save_pretrained(tmp_path / "mae")
    for see in (load_host, host_modalities, embed_width):
        with pytest.raises(InputError, match=r"of the family vit_mae, which is no encoder .*dinov3_vit"):
            see(f"transformers:{tmp_path / 'mae'}")


def weights(folder, change):
    """A folder whose weights went through ``change``."""
    state = load_file(folder / "model.safetensors")
    save_file(change(state), folder / "model.safetensors", metadata={"format": "pt"})


def test_missing_weights_are_refused_by_name(tmp_path):
    name = tiny.save(tmp_path / "h", "vit")
    weights(tmp_path / "h", lambda s: {k: v for k, v in s.items() if k != "layernorm.bias"})
    with pytest.raises(InputError, match=r"lacks weights, which would be random: 1 of \d+ \(layernorm.bias\)"):
        load_host(name)
    with pytest.warns(UserWarning, match="lacks weights"):
        b = load_host(name, allow_random=True)
    assert b.hint == f'{name} {{"allow_random": true}}'
    (tmp_path / "h" / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"no .*safetensors"):
        load_host(name)
    with pytest.warns(UserWarning, match="random"):
        prints = [load_host(name, allow_random=True, seed=s).fingerprint for s in (0, 0, 1)]
    assert prints[0] == prints[1] != prints[2]


def test_a_checkpoint_without_pooler_gives_the_class_token(tmp_path):
    name = tiny.save(tmp_path / "h", "vit")
    whole = load_host(name)
    weights(tmp_path / "h", lambda s: {k: v for k, v in s.items() if not k.startswith("pooler.")})
    b = load_host(name)
    data = batch(b)
    with torch.no_grad():
        want = b.model(**arguments(b)).last_hidden_state[:, 0]
    torch.testing.assert_close(b.encode_image(data.images), want)
    assert b.fingerprint != whole.fingerprint
    with b.edit("image.embed", lambda x: x + 1):
        torch.testing.assert_close(b.encode_image(data.images), want + 1)


def test_a_processor_that_does_not_fit_its_model(tmp_path):
    name = tiny.save(tmp_path / "h", "clip")
    t.CLIPImageProcessor(crop_size={"height": 48, "width": 48}, size={"shortest_edge": 48}).save_pretrained(
        tmp_path / "h"
    )
    with pytest.raises(InputError, match=r"gives images of 48 x 48 pixels .* takes 32 x 32"):
        load_host(name)
    t.CLIPImageProcessor(size={"shortest_edge": 32}, do_center_crop=False).save_pretrained(tmp_path / "h")
    with pytest.raises(InputError, match="images of several sizes"):
        load_host(name)
    (tmp_path / "h" / "preprocessor_config.json").unlink()
    with pytest.raises(InputError, match=r"cannot be loaded: .*preprocessor_config.json"):
        load_host(name)
    other = tiny.save(tmp_path / "d", "dinov2")  # interpolates its positions
    assert load_host(other).probe_input("image", 1).shape == (1, 3, 32, 32)


def test_a_tokenizer_that_is_not_there(tmp_path):
    name = tiny.save(tmp_path / "h", "clip")
    for file in (tmp_path / "h").glob("*token*"):
        file.unlink()
    b = load_host(name)
    assert b.width("text.embed") == 8  # needs none
    with pytest.raises(InputError, match="tokenizer of host"):
        b.tokenize(["a"])


def test_a_store_from_shards(tmp_path, made):
    from mmsae.activations import ActivationStore

    b = made("clip")
    shards = make_shards(tmp_path / "shards")
    sites = {"image": "vision_model.encoder.layers.1[patches]", "text": "text.embed"}
    store = ActivationStore(extract(b, shards, tmp_path / "s", sites=sites, batch_size=4, workers=0, progress=False))
    assert store.sites["image"].width == 16 and store.sites["image"].hint == b.hint
    assert len(store.load(modality="image")) == 16 * len(store.load(modality="text"))
