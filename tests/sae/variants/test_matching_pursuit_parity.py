"""Matching pursuit against codes that SAELens and overcomplete computed, where those are at hand."""

from pathlib import Path

import pytest
import torch

from mmsae import SAE
from mmsae.sae import Dictionary, PursuitEncoder

FOLDERS = Path(__file__).parents[4] / "shared" / "parity"


def load(name):
    from safetensors.torch import load_file

    folder = FOLDERS / name
    if not folder.is_dir():
        pytest.skip(f"no reference outputs of {name}")
    weights = folder / "sae_weights.safetensors"
    weights = load_file(weights) if weights.exists() else torch.load(folder / "state_dict.pt", weights_only=True)
    return weights, load_file(folder / "io.safetensors")


@pytest.mark.parametrize("gram", [False, True])
@pytest.mark.parametrize("library", ["saelens_matching_pursuit", "overcomplete_mp"])
def test_codes_and_reconstructions_are_theirs(library, gram):
    weights, io = load(library)
    if library.startswith("saelens"):
        atoms, bias = weights["W_dec"], weights["b_dec"]
        encoder = PursuitEncoder(steps=8, sign="relu", tol=0.3, stop_on_repeat=True, gram=gram)
    else:
        atoms, bias = weights["dictionary._weights"], None
        encoder = PursuitEncoder(steps=8, sign="max", gram=gram)
    sae = SAE(24, 96, modalities=["image"], encoder=encoder, dictionaries={"shared": Dictionary(bias=bias is not None)})
    with torch.no_grad():
        sae.dictionary("image").weight.copy_(atoms)
        if bias is not None:
            sae.dictionary("image").bias.copy_(bias)
        out = sae.eval()({"image": io["x"]})["image"]
    codes = out.codes.to_dense()
    assert torch.equal(codes != 0, io["codes"] != 0)
    torch.testing.assert_close(codes, io["codes"], rtol=0, atol=1e-5)
    torch.testing.assert_close(out.x_hat, io["x_hat"], rtol=1e-5, atol=1e-5)
