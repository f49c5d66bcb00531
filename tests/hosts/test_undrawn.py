"""Loading without drawing gives the bits of loading with it, whatever the files hold."""

import json
import warnings

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

import mmsae.hosts.load as load_module
from mmsae.hosts import load_host
from mmsae.hosts.undrawn import load_undrawn
from tests.helpers.encoders import MODELS, save_local


@pytest.fixture()
def calls(monkeypatch):
    """Loads a host with and without drawing, compares the two, and says how often the first was made."""
    counted = []

    def both(name, **options):
        def counting(load, model_of):
            counted.append(0)

            def once():
                counted[-1] += 1
                return load()

            return load_undrawn(once, model_of)

        hosts = []
        for way in (counting, lambda load, model_of: load()):
            monkeypatch.setattr(load_module, "load_undrawn", way)
            hosts.append(load_host(name, **options))
        tensors = [[*h.model.named_parameters(), *h.model.named_buffers()] for h in hosts]
        for (n, a), (m, b) in zip(*tensors, strict=True):
            assert n == m and torch.equal(a, b), n
        assert hosts[0].fingerprint == hosts[1].fingerprint and hosts[0].hint == hosts[1].hint
        return counted

    return both


@pytest.mark.parametrize("model", MODELS)
def test_open_clip_hosts(model, tmp_path, calls):
    torch.manual_seed(7)
    name, state = save_local(tmp_path, MODELS[model]), torch.get_rng_state()
    assert calls(name) == [1]
    assert torch.equal(torch.get_rng_state(), state)


def save_timm(folder, name="test_vit", without=(), **config):
    torch.manual_seed(1)
    model, cfg = timm.create_model(name), timm.get_pretrained_cfg(name).to_dict()
    state = {k: torch.randn_like(v) if v.is_floating_point() else v for k, v in model.state_dict().items()}
    folder.mkdir()
    save_file({k: v for k, v in state.items() if k not in without}, folder / "model.safetensors")
    about = {"architecture": name, "num_classes": 1000, "pretrained_cfg": {**cfg, "num_classes": 1000}, **config}
    (folder / "config.json").write_text(json.dumps(about))
    return f"timm:local-dir:{folder}"


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_convnext"])
def test_timm_hosts(name, tmp_path, calls):
    assert calls(save_timm(tmp_path / "a", name)) == [1]


def test_what_the_files_lack_is_drawn(tmp_path, calls):
    name = save_timm(tmp_path / "a")
    for seed in (0, 3):
        with pytest.warns(UserWarning, match="would be random"):
            counted = calls(name, num_classes=7, allow_random=True, seed=seed)
        assert counted[-1] == 2


def test_a_host_without_weights_is_drawn_once(tmp_path, calls):
    name = save_local(tmp_path, MODELS["vit"])
    (tmp_path / "open_clip_model.safetensors").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert calls(name, allow_random=True) == []
        assert calls("timm:test_vit", allow_random=True) == []


class Odd(nn.Module):
    """Has a tensor that no file holds."""

    def __init__(self, make):
        super().__init__()
        self.read = nn.Linear(3, 2)
        self.register_buffer("beside", make(), persistent=False)


@pytest.mark.parametrize(
    "make,times",
    [
        (lambda: torch.ones(3), 1),
        (lambda: torch.randn(3, generator=None), 2),
        (lambda: torch.cat([torch.rand(2) * 2, torch.ones(1)]), 2),
        (lambda: nn.init.xavier_normal_(torch.empty(2, 2)), 2),
        (lambda: nn.init.orthogonal_(torch.empty(2, 2)), 2),
        (lambda: torch.empty(4).exponential_(), 2),
        (lambda: torch.randperm(5), 2),
        (lambda: torch.zeros(4).bernoulli_(0.5), 2),
    ],
)
def test_what_lies_beside_the_files_is_drawn(make, times):
    weights = {"read.weight": torch.ones(2, 3), "read.bias": torch.zeros(2)}
    made = []

    def load():
        model = Odd(make)
        model.load_state_dict(weights)
        made.append(model)
        return model

    torch.manual_seed(5)
    model = load_undrawn(load, lambda m: m)
    torch.manual_seed(5)
    want = Odd(make)
    assert len(made) == times and torch.equal(model.beside, want.beside)
    assert torch.equal(model.read.weight, weights["read.weight"])


def test_embeddings_and_their_padding(tmp_path):
    """What is written after it was drawn, as the zero row of a padded embedding, is written."""
    torch.manual_seed(2)
    model = load_undrawn(lambda: nn.Embedding(4, 3, padding_idx=1), lambda m: m)
    torch.manual_seed(2)
    assert torch.equal(model.weight, nn.Embedding(4, 3, padding_idx=1).weight)
