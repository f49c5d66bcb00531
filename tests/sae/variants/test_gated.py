"""The Gated SAE against the oracles of sae_variants, section 1.5."""

import pytest
import torch

from mmsae import SAE, InputError
from mmsae.sae import (
    L1,
    AffineEncoder,
    GateAux,
    GatedEncoder,
    LossContext,
    PerModalityEncoder,
    Reconstruction,
    ReLU,
    TopK,
)


def model(d=12, h=30, modalities=("image",), encoder=None, selector=None):
    torch.manual_seed(0)
    sae = SAE(d, h, modalities=modalities, encoder=encoder or GatedEncoder(), selector=selector or ReLU()).double()
    x = {m: torch.randn(200, d).double() for m in modalities}
    sae.fit_normaliser(x)
    with torch.no_grad():
        for name, p in sae.encoder.named_parameters():
            if not name.endswith("weight"):
                p.normal_(std=0.3)
    return sae, x


def test_a_latent_fires_where_its_gate_and_its_magnitude_are_positive():
    gated, x = model()
    out = gated(x)["image"]
    gate, magnitude = out.pre.u > 0, out.pre.value > 0
    assert torch.equal(out.codes.to_dense() != 0, gate & magnitude) and not torch.equal(gate, magnitude)


def test_only_the_gates_terms_train_the_gate():
    sae, x = model()
    e = sae.encoder
    out, ctx = sae(x), LossContext(sae)
    (gate, r) = torch.autograd.grad(Reconstruction()(out, ctx), (e.b_gate, e.r_mag), allow_unused=True)
    assert gate is None and r.any()
    for term in (L1(on="gate"), GateAux()):
        gate, mag, r = torch.autograd.grad(term(sae(x), ctx), (e.b_gate, e.b_mag, e.r_mag), allow_unused=True)
        assert gate.any() and mag is None and r is None


def test_the_auxiliary_term_is_the_formula_and_stops_gradients_into_the_dictionary():
    sae, x = model()
    d, ctx = sae.dictionary("image"), LossContext(sae)
    weights = (d.weight, d.bias, *sae.encoder.parameters())
    got = GateAux(0.7)(sae(x), ctx)
    p = (x["image"] - d.bias) @ sae.encoder.weight.t()
    recon = (p + sae.encoder.b_gate).relu() @ d.weight.data + d.bias.data
    want = 0.7 * (x["image"] - recon).square().sum(1).mean() / sae.normaliser.variance("image")
    torch.testing.assert_close(got, want)
    a, b = (torch.autograd.grad(loss, weights, allow_unused=True) for loss in (got, want))
    assert a[0] is None and b[0] is None and a[1].any()  # the bias through the encoder's input alone
    for g, w in zip(a, b, strict=True):
        assert (g is None and w is None) or torch.allclose(g, w, rtol=1e-9)


def test_every_modality_may_have_gates_of_its_own_and_files_have_saelens_names(tmp_path):
    sae, x = model(modalities=("image", "text"), encoder=PerModalityEncoder(GatedEncoder()))
    assert {"W_enc.image", "b_gate.text", "b_mag.image", "r_mag.text"} <= set(sae.named_weights())
    GateAux().check(sae)
    assert GateAux()(sae(x), LossContext(sae)) > 0
    sae, x = model()
    assert set(sae.named_weights()) == {"W_enc", "b_gate", "b_mag", "r_mag", "W_dec", "b_dec"}
    again = SAE.from_pretrained(sae.float().save_pretrained(tmp_path / "sae"))
    assert torch.equal(again.encode(x["image"].float()).values, sae.encode(x["image"].float()).values)


def test_an_encoder_without_a_gate_is_refused():
    sae, _ = model(encoder=AffineEncoder(), selector=TopK(4))
    with pytest.raises(InputError, match="gate of encoder 'gated', this SAE's encoder is 'affine'"):
        GateAux().check(sae)
