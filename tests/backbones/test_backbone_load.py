"""Names, refusals, and what is known without weights."""

import json
import shutil
import subprocess
import sys

import huggingface_hub.constants
import pytest
import torch
from backbone_hosts import MODELS, save_local

from mmsae.backbones import embed_width, host_modalities, load_backbone, parse, site_width
from mmsae.types import InputError


@pytest.fixture()
def offline(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize(
    "name,want",
    [
        ("ViT-B-32/laion2b_s34b_b79k", ("open_clip", "ViT-B-32", "laion2b_s34b_b79k")),
        ("ViT-B/32", ("open_clip", "ViT-B-32", None)),
        ("ViT-B/32/openai", ("open_clip", "ViT-B-32", "openai")),
        ("ViT-B-32/some/file.pt", ("open_clip", "ViT-B-32", "some/file.pt")),
        ("ViT-B-32//abs/file.pt", ("open_clip", "ViT-B-32", "/abs/file.pt")),
        ("hf-hub:a/b", ("hf-hub", "a/b", None)),
        ("timm:test_vit.r160_in1k", ("timm", "test_vit.r160_in1k", None)),
    ],
)
def test_parse(name, want):
    assert tuple(parse(name)) == want


@pytest.mark.parametrize(
    "name,why",
    [
        ("ViT-B-33/openai", "near matches: .*ViT-B-32"),
        ("hf-hub:", "names nothing"),
        ("local-dir:/nowhere", "/nowhere/open_clip_config.json does not exist"),
    ],
)
def test_names_that_mean_nothing(name, why):
    with pytest.raises(InputError, match=why):
        parse(name)


def test_saved_and_loaded_it_is_the_same_host_wherever_it_lies(tmp_path):
    name = save_local(tmp_path / "a", MODELS["vit"])
    a = load_backbone(name)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    path = tmp_path / "b" / "open_clip_config.json"
    config = json.loads(path.read_text())
    config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = str(tmp_path / "b")  # a path is no identity
    config["model_cfg"]["vision_cfg"]["ls_init_value"] = None  # nor is a default that is spelled out
    path.write_text(json.dumps(config))
    b = load_backbone(f"local-dir:{tmp_path / 'b'}")
    assert a.fingerprint == b.fingerprint and a.hint == name != b.hint
    assert a.site("image.embed").same(b.site("image.embed"))

    def change(model):
        model.ln_final.bias[0] += 1e-6

    assert load_backbone(save_local(tmp_path / "c", MODELS["vit"], change=change)).fingerprint != a.fingerprint
    assert load_backbone(name, force_quick_gelu=True).fingerprint != a.fingerprint
    config["preprocess_cfg"]["mean"] = [0.1, 0.1, 0.1]
    path.write_text(json.dumps(config))
    assert load_backbone(f"local-dir:{tmp_path / 'b'}").fingerprint != a.fingerprint


def test_no_weights_are_refused_unless_asked_for(tmp_path):
    with pytest.raises(InputError, match=r"ViT-B-32/TAG .*laion2b_s34b_b79k.*allow_random"):
        load_backbone("ViT-B-32")
    name = save_local(tmp_path / "a", MODELS["timm_vit"])
    (tmp_path / "a" / "open_clip_model.safetensors").unlink()
    with pytest.raises(InputError, match="allow_random"):
        load_backbone(name)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    with pytest.warns(UserWarning, match="random"):
        prints = [load_backbone(name, allow_random=True, seed=s).fingerprint for s in (0, 0, 1)]
    assert prints[0] == prints[1] != prints[2]
    assert torch.equal(torch.get_rng_state(), state)


def test_broken_folders_name_themselves(tmp_path):
    name = save_local(tmp_path / "a", MODELS["vit"])
    config, weights = tmp_path / "a" / "open_clip_config.json", tmp_path / "a" / "open_clip_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="cannot be loaded"):
        load_backbone(name)
    weights.write_bytes(whole)
    good = json.loads(config.read_text())
    wrong = json.loads(config.read_text())
    wrong["model_cfg"]["vision_cfg"]["width"] = 48
    config.write_text(json.dumps(wrong))
    with pytest.raises(InputError, match="cannot be loaded"):
        load_backbone(name)
    del wrong["model_cfg"]["embed_dim"]
    config.write_text(json.dumps(wrong))
    with pytest.raises(InputError, match="no field 'embed_dim'"):
        embed_width(name)
    config.write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        load_backbone(name)
    config.write_text(json.dumps(good))
    for file in (tmp_path / "a").glob("*token*"):
        file.unlink()
    with pytest.raises(InputError, match="tokenizer"):
        load_backbone(name).tokenize(["a"])


@pytest.mark.parametrize(
    "name",
    [
        "hf-hub:nobody/nothing",
        "ViT-B-32/laion2b_s34b_b79k",
        "ViT-B-32/no_such_tag",
        "timm:test_vit",
        "timm:no_such_model",
    ],
)
def test_weights_that_cannot_be_had(offline, name, tmp_path):
    with pytest.raises(InputError, match=name):
        load_backbone(name, cache_dir=str(tmp_path))


def test_widths_need_no_weights(offline, tmp_path):
    name = save_local(tmp_path / "a", MODELS["vit"])
    (tmp_path / "a" / "open_clip_model.safetensors").unlink()
    assert embed_width(name) == 16 and site_width(name, "transformer.resblocks.0.mlp.c_fc[eos]") == 96
    assert embed_width("ViT-B-32") == embed_width("ViT-B-32/laion2b_s34b_b79k") == 512
    listed = "hf-hub:laion/CLIP-ViT-B-32-laion2B-s34B-b79K"
    assert embed_width(listed) == 512 and site_width(listed, "image.pooled") == 768
    assert embed_width("timm:test_vit") == 64
    assert host_modalities(name) == ("image", "text") and host_modalities("timm:test_vit") == ("image",)
    with pytest.raises(InputError, match="nobody/nothing"):
        embed_width("hf-hub:nobody/nothing")


def test_site_width_agrees_with_the_loaded_host(host):
    for kind in MODELS:
        for site in ("image.pooled", "text.pooled", "image.embed"):
            assert site_width(host(kind).hint, site) == host(kind).width(site)


def test_importing_the_package_loads_no_host_library():
    code = "import sys, mmsae.backbones; print(sorted({'open_clip', 'timm', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_cuda_without_cuda_is_said(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(InputError, match="no CUDA device"):
        load_backbone(save_local(tmp_path / "a", MODELS["vit"]), device="cuda")
