"""The layout is that of ViT-Prisma's repository; its formula is written out here."""

import json
from types import SimpleNamespace

import pytest
import torch

from mmsae import InputError
from mmsae.interop import load
from mmsae.interop.vit_prisma import write
from tests.helpers.foreign import some_sae

D, F = 6, 18


def checkpoint(folder, gated=False, wrapped=True, **fields):
    g = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (D, F), "b_enc": (F,), "W_dec": (F, D), "b_dec": (D,)}
    shapes |= dict.fromkeys(("b_gate", "r_mag", "b_mag"), (F,)) if gated else {}
    s = {n: torch.randn(*shape, generator=g) for n, shape in shapes.items()}
    torch.save({"state_dict": s} if wrapped else s, folder / "weights.pt")
    cfg = {"architecture": "gated" if gated else "standard", "d_in": D, "activation_fn_str": "relu"}
    cfg |= {"hook_point_layer": 9, "activation_fn_kwargs": {}, "normalize_activations": "layer_norm"}
    (folder / "config.json").write_text(json.dumps(cfg | fields))
    return s


def assert_codes(folder, z, s, x, norm=True):
    sae = load(folder)
    codes = sae.encode(x)
    torch.testing.assert_close(codes.to_dense(), z, atol=1e-5, rtol=1e-5)
    x_hat = z @ s["W_dec"] + s["b_dec"]
    mean, centred = x.mean(1, keepdim=True), x - x.mean(1, keepdim=True)
    x_hat = x_hat * centred.std(1, keepdim=True) + mean if norm else x_hat
    torch.testing.assert_close(sae.decode(codes), x_hat, atol=1e-5, rtol=1e-5)


def normalised(x):
    centred = x - x.mean(1, keepdim=True)
    return centred / (centred.std(1, keepdim=True) + 1e-5)


@pytest.mark.parametrize("wrapped", [True, False])
def test_standard_with_rows_standardised(wrapped, tmp_path):
    s, x = checkpoint(tmp_path, wrapped=wrapped), 3 * torch.randn(8, D) + 1
    assert_codes(tmp_path, ((normalised(x) - s["b_dec"]) @ s["W_enc"] + s["b_enc"]).relu(), s, x)


def test_topk_without_normalisation(tmp_path):
    fields = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 4}, "normalize_activations": "none"}
    s, x = checkpoint(tmp_path, **fields), torch.randn(8, D)
    top = ((x - s["b_dec"]) @ s["W_enc"] + s["b_enc"]).topk(4)
    assert_codes(tmp_path, torch.zeros(8, F).scatter(1, top.indices, top.values.relu()), s, x, norm=False)


def test_gated(tmp_path):
    s, x = checkpoint(tmp_path, gated=True), torch.randn(8, D)
    p = (normalised(x) - s["b_dec"]) @ s["W_enc"]
    z = ((p + s["b_gate"]) > 0) * (p * s["r_mag"].exp() + s["b_mag"]).relu()
    assert_codes(tmp_path, z, s, x)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"is_transcoder": True}, "has is_transcoder True"),
        ({"architecture": "jumprelu"}, "has architecture 'jumprelu'; mmsae reads 'standard' or 'gated'"),
        ({"activation_fn_str": "tanh-relu"}, "has activation_fn_str 'tanh-relu'"),
        ({"activation_fn_str": "topk"}, "k of activation_fn_kwargs must be a whole number of at least 1, not None"),
        ({"d_in": 7}, "says d_in 7, W_dec has width 6"),
        ({"normalize_activations": "constant_norm_rescale"}, "has normalize_activations 'constant_norm_rescale'"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(fields, why, tmp_path):
    checkpoint(tmp_path, **fields)
    with pytest.raises(InputError, match=why):
        load(tmp_path)


def test_weights_pickled_with_their_configuration_are_not_unpickled(tmp_path):
    s = checkpoint(tmp_path)
    torch.save({"cfg": SimpleNamespace(d_in=D), "state_dict": s}, tmp_path / "weights.pt")
    with pytest.raises(InputError, match="cannot be read as a file of tensors"):
        load(tmp_path)
    with pytest.raises(InputError, match="that of a training run"):
        write(some_sae("topk"), tmp_path / "out")
