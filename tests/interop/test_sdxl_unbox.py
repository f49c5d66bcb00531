"""The layout is that of the repository of sdxl-unbox; its formula is written out here."""

import json

import pytest
import torch

from mmsae import InputError
from mmsae.interop import load
from mmsae.interop.sdxl_unbox import write
from tests.helpers.foreign import some_sae

D, F = 6, 18


def checkpoint(folder, **fields):
    g = torch.Generator().manual_seed(0)
    shapes = {"encoder.weight": (F, D), "latent_bias": (F,), "decoder.weight": (D, F), "pre_bias": (D,)}
    s = {n: torch.randn(*shape, generator=g) for n, shape in shapes.items()}
    torch.save({"state_dict": s | {"stats_last_nonzero": torch.zeros(F)}}, folder / "state_dict.pth")
    cfg = {"n_dirs_local": F, "d_model": D, "k": 4, "auxk": 8, "dead_steps_threshold": 10}
    (folder / "config.json").write_text(json.dumps(cfg | fields))
    return s


def test_codes_and_reconstructions_by_the_naive_formula(tmp_path):
    s, x = checkpoint(tmp_path), torch.randn(8, D)
    torch.save(torch.zeros(D), tmp_path / "mean.pt")
    top = ((x - s["pre_bias"]) @ s["encoder.weight"].t() + s["latent_bias"]).topk(4)
    z = torch.zeros(8, F).scatter(1, top.indices, top.values.relu())
    sae = load(tmp_path)
    codes = sae.encode(x)
    torch.testing.assert_close(codes.to_dense(), z, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sae.decode(codes), z @ s["decoder.weight"].t() + s["pre_bias"], atol=1e-5, rtol=1e-5)


def test_what_does_not_fit_is_refused(tmp_path):
    checkpoint(tmp_path, n_dirs_local=20)
    with pytest.raises(InputError, match=r"encoder.weight in .* has shape \(18, 6\), \(20, 6\) was expected"):
        load(tmp_path)
    with pytest.raises(InputError, match="mmsae writes no folders of sdxl_unbox"):
        write(some_sae("topk"), tmp_path / "out")
