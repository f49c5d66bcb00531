"""Hosts whose files lack weights are refused, unless random ones are allowed; what was said and kept of it."""

import json
import shutil

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from mmsae.cli import main
from mmsae.hosts import load_host
from mmsae.types import InputError
from tests.helpers import lvlm as lvlm_hosts
from tests.helpers.diffusion import MAKE


def rewrite(file, change):
    """The tensors of a file by ``change``: ``{name: tensor} -> {name: tensor}``."""
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """``{kind: folder}`` of hosts with all of their weights."""
    root = tmp_path_factory.mktemp("whole")
    lvlm_hosts.llava(root / "lvlm")
    MAKE["sd"]().save_pretrained(root / "diffusers")
    return root


@pytest.fixture()
def copy(whole, tmp_path):
    def get(kind):
        return shutil.copytree(whole / kind, tmp_path / kind)

    return get


def test_tensors_under_other_names(copy, tmp_path, capsys):
    folder = copy("lvlm")
    n = len(load_file(folder / "model.safetensors"))
    rewrite(folder / "model.safetensors", lambda t: {f"module.{k}": v for k, v in t.items()})
    name = f"lvlm:{folder}"
    with pytest.raises(
        InputError, match=rf"random: {n} of {n} \(.*\.\.\.\); .*no place for: {n} \(module\..*--allow-random"
    ):
        load_host(name)
    (tmp_path / "s.tar").write_bytes(bytes(1024))
    with pytest.raises(SystemExit) as ended:
        main(["extract", "--host", name, "--shards", str(tmp_path / "s.tar"), "--out", str(tmp_path / "store")])
    assert ended.value.code == 2 and not (tmp_path / "store").exists()
    with pytest.warns(UserWarning, match="would be random"):
        host = load_host(name, allow_random=True)
    assert json.loads(host.hint.removeprefix(name)) == {"allow_random": True}
    with pytest.warns(UserWarning, match="would be random"):
        again = load_host(host.hint)  # as a store or an SAE would
    assert again.fingerprint == host.fingerprint and again.hint == host.hint
    with pytest.warns(UserWarning):
        assert load_host(name, allow_random=True, seed=1).fingerprint != host.fingerprint


def test_a_part_of_a_pipeline_that_lacks_some(copy):
    folder = copy("diffusers")
    rewrite(folder / "text_encoder" / "model.safetensors", lambda t: {k: v for k, v in t.items() if "fc1" not in k})
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    rewrite(file, lambda t: {k: v for k, v in t.items() if k != "conv_in.weight"})
    with pytest.raises(InputError, match=r"text_encoder: 6 of \d+ \(.*fc1.*unet: 1 of \d+ \(conv_in.weight\)"):
        load_host(f"diffusers:{folder}")
    with pytest.warns(UserWarning, match="would be random"):
        hosts = [load_host(f"diffusers:{folder}", allow_random=True) for _ in range(2)]
    assert hosts[0].fingerprint == hosts[1].fingerprint and "allow_random" in hosts[0].hint


def test_a_tensor_of_another_shape(copy):
    folder = copy("lvlm")
    rewrite(
        folder / "model.safetensors", lambda t: t | {k: v[:, :-1].contiguous() for k, v in t.items() if "lm_head" in k}
    )
    with pytest.raises(
        InputError, match=r"1 of \d+ \(lm_head.weight \(\d+, 31\) in the file, \(\d+, 32\) in the model\)"
    ):
        load_host(f"lvlm:{folder}")


def test_tensors_that_are_too_many_are_said(copy, recwarn):
    folder = copy("lvlm")
    rewrite(folder / "model.safetensors", lambda t: t | {"model.extra.weight": torch.ones(2)})
    host = load_host(f"lvlm:{folder}")
    assert any("no place for: 1 (model.extra.weight)" in str(w.message) for w in recwarn)
    assert host.hint == f"lvlm:{folder}"


def test_tied_weights_are_not_missing(copy, recwarn):
    folder = copy("lvlm")
    config = json.loads((folder / "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True
    (folder / "config.json").write_text(json.dumps(config))
    rewrite(folder / "model.safetensors", lambda t: {k: v for k, v in t.items() if "lm_head" not in k})
    host = load_host(f"lvlm:{folder}")
    assert host.hint == f"lvlm:{folder}" and not any("random" in str(w.message) for w in recwarn)
    model = host.model
    assert torch.equal(model.get_output_embeddings().weight, model.get_input_embeddings().weight)


def test_another_number_of_classes_leaves_a_classifier_without_weights(tmp_path):
    model = timm.create_model("test_vit")
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    cfg = {
        "architecture": "test_vit",
        "num_classes": 1000,
        "pretrained_cfg": {"num_classes": 1000, "classifier": "head"},
    }
    (tmp_path / "config.json").write_text(json.dumps(cfg))
    name = f"timm:local-dir:{tmp_path}"
    assert load_host(name, num_classes=0).hint == f'{name} {{"num_classes": 0}}'
    with pytest.raises(InputError, match=r"2 of \d+ \(head.weight, head.bias\)"):
        load_host(name, num_classes=7)
    with pytest.warns(UserWarning, match="would be random"):
        host = load_host(name, num_classes=7, allow_random=True)
    assert torch.equal(host.model.cls_token, model.cls_token) and host.model.head.out_features == 7


@pytest.mark.parametrize("error", [KeyError, TypeError, AttributeError])
@pytest.mark.parametrize(
    "kind, ours",
    [
        ("lvlm", "mmsae.hosts.loaded.check"),
        ("lvlm", "mmsae.hosts.loaded.Loaded.of"),
        ("lvlm", "mmsae.hosts.lvlm.host.decoder_path"),
        ("lvlm", "mmsae.hosts.lvlm.host.check_processor"),
        ("diffusers", "mmsae.hosts.loaded.check"),
        ("diffusers", "mmsae.hosts.loaded.Loaded.of"),
        ("diffusers", "mmsae.hosts.loaded._initialise"),
        ("diffusers", "mmsae.hosts.diffusion.load._leave_out"),
        ("diffusers", "mmsae.hosts.diffusion.call.parts"),
    ],
)
def test_a_fault_of_ours_is_no_fault_of_the_host(whole, kind, ours, error, monkeypatch):
    def broken(*_, **__):
        raise error("ours")

    monkeypatch.setattr(ours, broken)
    with pytest.raises(error, match="ours"):
        load_host(f"{kind}:{whole / kind}", allow_random=True)
