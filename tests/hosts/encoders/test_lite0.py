"""EfficientNet-Lite0 from its package: timm's names, and the images of things that it knows."""

import hashlib
from pathlib import Path

import pytest
import timm
import torch

from mmsae.errors import InputError
from mmsae.hosts import load_host
from mmsae.hosts.encoders import lite0

SHARED = Path(__file__).parents[4] / "shared"
installed = pytest.mark.skipif(lite0.checkpoint() is None, reason=f"{lite0.PACKAGE} is not installed")


def names_of_the_package():
    """The names that the package has for the weights of timm's model, in its order."""
    model = timm.create_model(lite0.ARCHITECTURE)
    return model.state_dict()


def packaged(state):
    """Timm's weights under the package's names, written down a second way: by the order of layers."""
    out, block, last = {}, -1, ""
    for name, value in state.items():
        if not name.startswith("blocks."):
            first, _, rest = name.partition(".")
            outer = {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1"}
            out[f"{outer.get(first, '_fc')}.{rest}"] = value
            continue
        _, stage, number, layer, rest = name.split(".", 4)
        if (stage, number) != last:
            block, last = block + 1, (stage, number)
        names = ["_depthwise_conv", "_bn1", "_project_conv", "_bn2"]
        timms = ["conv_dw", "bn1", "conv_pw", "bn2"]
        if block:
            names = ["_expand_conv", "_bn0", *names]
            timms = ["conv_pw", "bn1", "conv_dw", "bn2", "conv_pwl", "bn3"]
        out[f"_blocks.{block}.{names[timms.index(layer)]}.{rest}"] = value
    return out


def test_every_weight_gets_timms_name():
    state = names_of_the_package()
    assert lite0.timm_names(packaged(state)).keys() == state.keys()
    assert all(torch.equal(v, state[k]) for k, v in lite0.timm_names(packaged(state)).items())


@pytest.mark.parametrize("name", ["_blocks.16._bn1.weight", "_blocks.0._se.weight", "_dropout.p"])
def test_other_weights_are_refused(name):
    with pytest.raises(InputError, match="which EfficientNet-Lite0 has not"):
        lite0.timm_names({name: torch.zeros(1)})


def test_without_the_package_the_sentence_names_it(monkeypatch, tmp_path):
    monkeypatch.setenv("MMSAE_CACHE", str(tmp_path))
    monkeypatch.setattr(lite0, "checkpoint", lambda: None)
    with pytest.raises(InputError, match=r"pip install 'mmsae\[lite0\]'"):
        load_host("lite0")
    assert not list(tmp_path.iterdir())


def test_another_file_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("MMSAE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "other.pth").write_bytes(b"other")
    monkeypatch.setattr(lite0, "checkpoint", lambda: tmp_path / "other.pth")
    with pytest.raises(InputError, match=f"the hash {hashlib.sha256(b'other').hexdigest()[:8]}, not 57934424"):
        load_host("lite0")


@installed
def test_the_host_is_known_by_its_weights_and_loads_again_by_its_hint(monkeypatch, tmp_path):
    monkeypatch.setenv("MMSAE_CACHE", str(tmp_path))
    host = load_host("lite0")
    assert host.hint == "lite0" and host.site("image.embed").hint == "lite0"
    assert load_host(host.hint).fingerprint == host.fingerprint
    assert host.width("image.embed") == 1280 and host.classifier[0].shape == (1000, 1280)


@installed
def test_its_logits_are_those_of_the_converted_host_at_hand(monkeypatch, tmp_path):
    if not (SHARED / "hosts" / "lite0").is_dir():
        pytest.skip("the shared host is not here")
    monkeypatch.setenv("MMSAE_CACHE", str(tmp_path))
    mine, theirs = load_host("lite0"), load_host(f"timm:local-dir:{SHARED / 'hosts' / 'lite0'}")
    x = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        a, b = (h.model.eval()(x) for h in (mine, theirs))
    assert torch.allclose(a, b, rtol=0, atol=0.05) and torch.equal(a.argmax(1), b.argmax(1))  # theirs is of float16
