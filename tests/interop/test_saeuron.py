"""The layout is that of SAeUron's repository; its formula is written out here."""

import json

import pytest
import torch
from safetensors.torch import save_file

from mmsae import InputError
from mmsae.interop import load
from mmsae.interop.saeuron import write
from mmsae.sae.foreign import library_of
from tests.helpers.foreign import some_sae

D, F = 6, 18


def checkpoint(folder, **fields):
    g = torch.Generator().manual_seed(0)
    shapes = {"encoder.weight": (F, D), "encoder.bias": (F,), "W_dec": (F, D), "b_dec": (D,)}
    s = {n: torch.randn(*shape, generator=g) for n, shape in shapes.items()}
    save_file(s, folder / "sae.safetensors")
    cfg = {"expansion_factor": 3, "num_latents": 0, "k": 4, "batch_topk": False, "sample_topk": False}
    (folder / "cfg.json").write_text(json.dumps(cfg | {"input_unit_norm": False, "d_in": D} | fields))
    return s


@pytest.mark.parametrize("norm", [True, False])
def test_codes_and_reconstructions_by_the_naive_formula(norm, tmp_path):
    s, x = checkpoint(tmp_path, input_unit_norm=norm), 2 * torch.randn(8, D) + 1
    mean = x.mean(1, keepdim=True)
    std = (x - mean).std(1, keepdim=True)
    y = (x - mean) / (std + 1e-5) if norm else x
    top = ((y - s["b_dec"]) @ s["encoder.weight"].t() + s["encoder.bias"]).relu().topk(4)
    z = torch.zeros(8, F).scatter(1, top.indices, top.values)
    x_hat = z @ s["W_dec"] + s["b_dec"]
    sae = load(tmp_path)
    codes = sae.encode(x)
    assert library_of(tmp_path) == "saeuron"
    torch.testing.assert_close(codes.to_dense(), z, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sae.decode(codes), x_hat * std + mean if norm else x_hat, atol=1e-5, rtol=1e-5)


def test_codes_that_depend_on_other_rows_need_a_threshold(tmp_path):
    s, x = checkpoint(tmp_path, batch_topk=True), torch.randn(8, D)
    with pytest.raises(InputError, match="batch_topk, which ranks over all rows together: give a threshold"):
        load(tmp_path)
    u = ((x - s["b_dec"]) @ s["encoder.weight"].t() + s["encoder.bias"]).relu()
    torch.testing.assert_close(load(tmp_path, threshold=0.7).encode(x).to_dense(), u * (u > 0.7), atol=1e-5, rtol=1e-5)
    checkpoint(tmp_path, sample_topk=True)
    with pytest.raises(InputError, match="has sample_topk True; mmsae reads False"):
        load(tmp_path)
    with pytest.raises(InputError, match="--to sparsify"):
        write(some_sae("topk"), tmp_path / "out")
