"""Names, refusals, and what is known without weights."""

import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace

import huggingface_hub.constants
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from mmsae.hosts import embed_width, host_modalities, load_host, named_host, parse, site_width, with_options
from mmsae.hosts.names import split_options
from mmsae.types import InputError, Site
from tests.helpers.encoders import MODELS, save_local


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
        ("local-dir:/nowhere", "the folder /nowhere does not exist"),
    ],
)
def test_names_that_mean_nothing(name, why):
    with pytest.raises(InputError, match=why):
        parse(name)


def test_saved_and_loaded_it_is_the_same_host_wherever_it_lies(tmp_path):
    name = save_local(tmp_path / "a", MODELS["vit"])
    a = load_host(name)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    path = tmp_path / "b" / "open_clip_config.json"
    config = json.loads(path.read_text())
    config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = str(tmp_path / "b")  # a path is no identity
    config["model_cfg"]["vision_cfg"]["ls_init_value"] = None  # nor is a default that is spelled out
    path.write_text(json.dumps(config))
    b = load_host(f"local-dir:{tmp_path / 'b'}")
    assert a.fingerprint == b.fingerprint and a.hint == name != b.hint
    assert a.site("image.embed").same(b.site("image.embed"))

    def change(model):
        model.ln_final.bias[0] += 1e-6

    assert load_host(save_local(tmp_path / "c", MODELS["vit"], change=change)).fingerprint != a.fingerprint
    assert load_host(name, force_quick_gelu=True).fingerprint != a.fingerprint
    config["preprocess_cfg"]["mean"] = [0.1, 0.1, 0.1]
    path.write_text(json.dumps(config))
    assert load_host(f"local-dir:{tmp_path / 'b'}").fingerprint != a.fingerprint


def test_no_weights_are_refused_unless_asked_for(tmp_path):
    with pytest.raises(InputError, match=r"ViT-B-32/TAG .*laion2b_s34b_b79k.*allow_random"):
        load_host("ViT-B-32")
    name = save_local(tmp_path / "a", MODELS["timm_vit"])
    (tmp_path / "a" / "open_clip_model.safetensors").unlink()
    with pytest.raises(InputError, match="allow_random"):
        load_host(name)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    with pytest.warns(UserWarning, match="random"):
        prints = [load_host(name, allow_random=True, seed=s).fingerprint for s in (0, 0, 1)]
    assert prints[0] == prints[1] != prints[2]
    assert torch.equal(torch.get_rng_state(), state)


def test_broken_folders_name_themselves(tmp_path):
    name = save_local(tmp_path / "a", MODELS["vit"])
    config, weights = tmp_path / "a" / "open_clip_config.json", tmp_path / "a" / "open_clip_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="cannot be loaded"):
        load_host(name)
    weights.write_bytes(whole)
    good = json.loads(config.read_text())
    wrong = json.loads(config.read_text())
    wrong["model_cfg"]["vision_cfg"]["width"] = 48
    config.write_text(json.dumps(wrong))
    with pytest.raises(InputError, match="cannot be loaded"):
        load_host(name)
    del wrong["model_cfg"]["embed_dim"]
    config.write_text(json.dumps(wrong))
    with pytest.raises(InputError, match="no field 'embed_dim'"):
        embed_width(name)
    config.write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        load_host(name)
    config.write_text(json.dumps(good))
    for file in (tmp_path / "a").glob("*token*"):
        file.unlink()
    with pytest.raises(InputError, match="tokenizer"):
        load_host(name).tokenize(["a"])


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
        load_host(name, cache_dir=str(tmp_path))


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
    code = "import sys, mmsae.hosts; print(sorted({'open_clip', 'timm', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_cuda_without_cuda_is_said(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(InputError, match="no CUDA device"):
        load_host(save_local(tmp_path / "a", MODELS["vit"]), device="cuda")


def test_options_in_a_name():
    name = with_options("timm:a/b", {"img_size": 224, "token": "secret", "device_map": "auto", "dtype": torch.float16})
    assert name == 'timm:a/b {"dtype": "float16", "img_size": 224}'
    assert split_options(name) == ("timm:a/b", {"dtype": "float16", "img_size": 224})
    assert with_options(name, {"img_size": [8, 8]}) == 'timm:a/b {"dtype": "float16", "img_size": [8, 8]}'
    assert split_options("local-dir:a b/{c}") == ("local-dir:a b/{c}", {}) and parse(name).model == "a/b"
    with pytest.raises(InputError, match="no JSON object"):
        split_options("timm:a {img_size: 3}")


def test_the_host_that_sites_hint_at():
    sites = {"image": Site("", "image.embed", modality="image", hint='timm:x {"img_size": 8}')}
    assert named_host("", sites) == named_host(None, sites) == 'timm:x {"img_size": 8}'
    for own in ("timm:y", 'timm:y {"cache_dir": "here"}'):  # as it is: some options are for loading alone
        assert named_host(own, sites) == own
    assert named_host(with_options("", {"allow_random": True}), sites) == 'timm:x {"allow_random": true, "img_size": 8}'
    with pytest.raises(InputError, match="name it with --host"):
        named_host("", {})
    stranger = {"image": replace(sites["image"], hint='lvlm:x/y {"trust_remote_code": true}')}
    with pytest.raises(InputError, match="trust_remote_code, which is not taken from a file"):
        named_host("", stranger)
    assert named_host("lvlm:x/y", stranger) == "lvlm:x/y"


@pytest.fixture()
def timm_folder(tmp_path):
    """A ViT of timm for images of 160 pixels, in timm's folder format."""
    model = timm.create_model("test_vit", num_classes=0)
    (tmp_path / "tower").mkdir()
    save_file(model.state_dict(), tmp_path / "tower" / "model.safetensors")
    config = {
        "architecture": "test_vit",
        "num_classes": 0,
        "pretrained_cfg": {"num_classes": 0, "input_size": [3, 160, 160]},
    }
    (tmp_path / "tower" / "config.json").write_text(json.dumps(config))
    return tmp_path / "tower"


def test_the_name_of_a_folder_of_timm_is_found(timm_folder, tmp_path, monkeypatch):
    right = f"timm:local-dir:{timm_folder}"
    for wrong in (str(timm_folder), f"local-dir:{timm_folder}", f"timm:{timm_folder}", f"lvlm:{timm_folder}"):
        with pytest.raises(InputError, match=f"write {right}"):
            load_host(wrong)
    assert load_host(right).hint == right
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_host("timm:local-dir:~/tower").fingerprint == load_host(right).fingerprint
    with pytest.raises(InputError, match=f"the folder {tmp_path}/towr does not exist"):
        load_host("timm:local-dir:~/towr")
    with pytest.raises(InputError, match="names nothing after 'timm:local-dir:'"):
        parse("timm:local-dir:")


def test_a_checkpoint_file_of_timm(timm_folder, tmp_path):
    right = load_host(f"timm:local-dir:{timm_folder}")
    name = f"timm:{timm_folder / 'model.safetensors'}"
    assert load_host(name).fingerprint == right.fingerprint and load_host(name).hint == name
    state = {k: v + 1e-3 for k, v in right.model.state_dict().items()}
    save_file(state, timm_folder / "epoch2.safetensors")  # another one beside it
    other = load_host(f"timm:{timm_folder / 'epoch2.safetensors'}")
    assert other.fingerprint != right.fingerprint and torch.equal(other.model.norm.bias, right.model.norm.bias + 1e-3)
    torch.save({"epoch": 3, "model": state}, tmp_path / "run.pth")
    plain = f"timm:test_vit/{tmp_path / 'run.pth'}"
    loose = load_host(plain, num_classes=0)
    assert torch.equal(loose.model.norm.bias, other.model.norm.bias) and "state_dict" not in loose.model.pretrained_cfg
    assert load_host(loose.hint).fingerprint == loose.fingerprint and site_width(loose.hint, "image.embed") == 64
    torch.save({k: v for k, v in state.items() if k != "norm.bias"}, tmp_path / "part.pth")
    with pytest.raises(InputError, match=r"lacks weights, .*: 1 of \d+ \(norm.bias\)"):
        load_host(f"timm:test_vit/{tmp_path / 'part.pth'}", num_classes=0)
    with pytest.raises(InputError, match=r"lacks weights, .*: 3 of \d+ \(norm.bias, head.weight, head.bias\)"):
        load_host(f"timm:test_vit/{tmp_path / 'part.pth'}", num_classes=5)
    torch.save({"model": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(InputError, match="cannot be loaded"):
        load_host(f"timm:test_vit/{tmp_path / 'evil.pth'}", num_classes=0)
    assert not (tmp_path / "ran").exists()
    for wrong, why in (
        (f"timm:{tmp_path / 'run.pth'}", "has no config.json of timm; write timm:ARCHITECTURE/"),
        ("timm:test_vit/none.pth", "the file none.pth does not exist"),
        ("timm:test_vitt/none.pth", r"is no timm architecture; near matches: .*test_vit"),
    ):
        with pytest.raises(InputError, match=why):
            load_host(wrong)


class Evil:
    """What a pickle could run."""

    def __reduce__(self):
        return (exec, ("open('ran', 'w').close()",))


def test_options_reach_the_host_and_its_sites(timm_folder):
    name = f"timm:local-dir:{timm_folder}"
    host = load_host(name, img_size=64)
    assert host.hint == f'{name} {{"img_size": 64}}' and host.site("image.embed").hint == host.hint
    assert host.transform()(Image.new("RGB", (90, 70))).shape == (3, 64, 64)
    again = load_host(host.hint)
    assert again.fingerprint == host.fingerprint != load_host(name).fingerprint
    assert site_width(host.hint, "blocks.0") == 64 and again.encode_image(torch.zeros(1, 3, 64, 64)).shape == (1, 64)
    with pytest.raises(InputError, match="no_such_option"):
        load_host(name, no_such_option=3)


def test_a_folder_that_was_mistyped(offline, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for kind in ("lvlm", "diffusers"):
        with pytest.raises(InputError, match=r"the folder runs/typo does not exist \(runs does\)"):
            load_host(f"{kind}:runs/typo")
        with pytest.raises(InputError, match="the folder runs/a/typo does not exist"):
            load_host(f"{kind}:runs/a/typo")


def test_the_whole_reason_is_kept_in_one_line(tmp_path):
    name = save_local(tmp_path / "a", MODELS["vit"])
    file = tmp_path / "a" / "open_clip_model.safetensors"
    state = load_file(file)
    save_file({k: v for k, v in state.items() if k != "ln_final.bias"}, file)
    with pytest.raises(
        InputError, match=r'cannot be loaded: .*Missing key\(s\) in state_dict: "ln_final.bias"'
    ) as said:
        load_host(name)
    assert "\n" not in str(said.value)
    other = {**MODELS["vit"], "text_cfg": {**MODELS["vit"]["text_cfg"], "width": 48}}
    save_local(tmp_path / "b", other)
    shutil.copy(tmp_path / "b" / "open_clip_model.safetensors", file)
    with pytest.raises(InputError, match=r"cannot be loaded: .*(size mismatch|width changed)"):
        load_host(name)
    for empty in ("e.bin", "e.pt"):
        (tmp_path / empty).write_bytes(b"")
        with pytest.raises(InputError, match=r"cannot be loaded: [A-Za-z]"):
            load_host(f"ViT-B-32/{tmp_path / empty}")


def test_the_batch_size_follows_host_and_device(tmp_path, monkeypatch):
    small = load_host(save_local(tmp_path / "a", MODELS["vit"]))  # 32 pixels
    sizes = {}
    for side in (160, 224, 336, 560):
        options = {"img_size": side, "embed_dim": 16, "depth": 1, "num_heads": 1}
        with pytest.warns(UserWarning, match="random"):
            host = load_host("timm:vit_tiny_patch16_224", allow_random=True, **options)
        sizes[side] = host.batch_size()
        assert host.batch_size(100) == 100
    assert sizes == {160: 16, 224: 16, 336: 4, 560: 4}
    assert small.batch_size() == 256
    with pytest.raises(InputError, match="batch_size is 0"):
        small.batch_size(0)
    monkeypatch.setattr(type(host), "device", torch.device("cuda"))
    assert host.batch_size() == 256


def test_a_hub_out_of_reach_is_said_at_once(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    begun = time.monotonic()
    for name in ("ViT-B-32/laion2b_s34b_b79k", "transformers:nobody/nothing"):
        with pytest.raises(InputError, match=f"{name}' cannot be loaded: the hub cannot be reached, ConnectError; "):
            load_host(name, cache_dir=str(tmp_path))
    assert time.monotonic() - begun < 20  # each file that it asks for by itself takes 23 s
    with pytest.raises(InputError, match="cannot be loaded") as e:
        load_host(f"timm:local-dir:{_broken(tmp_path / 'broken')}")
    assert "the hub cannot" not in str(e.value)


def _broken(folder):
    folder.mkdir()
    (folder / "config.json").write_text('{"architecture": "test_vit"}')
    (folder / "model.safetensors").write_bytes(b"nothing")
    return folder
