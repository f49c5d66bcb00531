"""Pursuits as encoders of an SAE: compositions, what gets gradients, and what may be changed at inference."""

import pytest
import torch

from mmsae import SAE, InputError
from mmsae.sae import (
    AuxK,
    Dictionary,
    LossContext,
    PursuitEncoder,
    Reconstruction,
    UsageTracker,
)
from tests.helpers.recipes import atoms_rows

KINDS = ("mp", "omp", "gp")


def model(kind="mp", d_sae=48, bias=True, **kw):
    torch.manual_seed(0)
    encoder = PursuitEncoder(kind, **({"steps": 4} | kw))
    sae = SAE(16, d_sae, modalities=["image"], encoder=encoder, dictionaries={"shared": Dictionary(bias=bias)})
    with torch.no_grad():
        if bias:
            sae.dictionary("image").bias.copy_(0.1 * torch.randn(16))
    return sae


def gradients(sae, loss):
    sae.zero_grad()
    loss.backward()
    d = sae.dictionary("image")
    return d.weight.grad.norm(dim=1), None if d.bias.grad is None else d.bias.grad.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_a_pursuit_has_no_weights_but_the_dictionary_and_codes_what_the_bias_leaves(kind):
    sae, x = model(kind), atoms_rows(30)
    assert {n for n, _ in sae.named_parameters()} == {"dictionaries.shared.weight", "dictionaries.shared.bias"}
    out = sae({"image": x})["image"]
    assert out.codes.values.shape == (30, 4) and (out.codes.values >= 0).all()
    torch.testing.assert_close(out.pre.x, out.target - out.recon, rtol=0, atol=1e-5)
    torch.testing.assert_close(out.pre.dense(), (x - out.recon) @ sae.dictionary("image").rows().T, rtol=0, atol=1e-4)
    assert (out.pre.steps <= 4).all() and (out.codes.l0() <= out.pre.steps).all()


def test_mp_trains_through_its_values_and_the_fitted_pursuits_through_decoding():
    x = atoms_rows(30)
    for kind in KINDS:
        sae = model(kind)
        out = sae({"image": x})["image"]
        assert out.codes.values.requires_grad == (kind == "mp")
        w, _ = gradients(sae, Reconstruction("sum")({"image": out}, LossContext(sae)))
        chosen = torch.zeros(48, dtype=torch.bool)
        chosen[out.codes.indices[out.codes.values != 0]] = True
        assert torch.equal(w != 0, chosen)
    # the gradient of MP is that of the function that fixed picks make
    sae = model("mp", steps=3).double()
    d = sae.dictionary("image")
    out = sae({"image": x})["image"]
    out.codes.values.square().sum().backward()
    with torch.no_grad():
        g, eps, delta = d.weight.grad, 1e-6, torch.randn_like(d.weight)
        ends = []
        for sign in (1, -1):
            d.weight += sign * eps * delta
            after = sae.encoder(x.double(), d, "image")
            assert torch.equal(after.indices, out.codes.indices)
            ends.append(after.values.double().square().sum())
            d.weight -= sign * eps * delta
    assert float((g * delta).sum()) == pytest.approx(float((ends[0] - ends[1]) / (2 * eps)), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_auxk_reaches_the_atoms_of_dead_latents_and_no_others(kind):
    sae, x = model(kind, steps=2), atoms_rows(64)
    usage = UsageTracker(48, ["image"])
    out = sae({"image": x})
    usage.update({"image": out["image"].codes})
    fired = usage.since[0] == 0
    assert fired.any() and not fired.all()
    w, _ = gradients(sae, AuxK(1.0, k_aux=8, dead_after=64)(out, LossContext(sae, usage)))
    assert (w[fired] == 0).all() and (w[~fired] > 0).any()


def test_steps_and_tolerance_may_change_at_inference(tmp_path):
    sae, x = model(steps=2, sign="abs").eval(), atoms_rows(100)
    with torch.no_grad():
        errors = []
        for steps in (2, 8, 32):
            sae.encoder.adapt_(steps)
            errors.append((x - sae({"image": x})["image"].x_hat).norm(dim=1))
        assert (errors[0] > errors[1]).all() and (errors[1] >= errors[2]).all()
        sae.encoder.adapt_(64, tol=0.3)
        out = sae({"image": x})["image"]
        assert (out.pre.x.norm(dim=1) < 0.3).all() and len(out.pre.steps.unique()) > 2
        again = SAE.from_pretrained(sae.save_pretrained(tmp_path / "sae"))
        assert (again.encoder.steps, again.encoder.tol) == (64, 0.3)
        assert torch.equal(again.encode(x).to_dense(), out.codes.to_dense())


def test_with_and_without_inner_products_of_atoms_codes_agree():
    x = atoms_rows(100)
    codes = []
    for gram in (True, False, "auto"):
        with torch.no_grad():
            codes.append(model(steps=12, gram=gram).eval().encode(x).to_dense())
    torch.testing.assert_close(codes[0], codes[1], rtol=0, atol=1e-5)
    torch.testing.assert_close(codes[2], codes[1], rtol=0, atol=1e-5)


def test_half_precision_rows_are_coded_in_float32():
    sae, x = model(steps=12).eval(), atoms_rows(20).bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        codes = sae.encode(x)
    assert codes.values.dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(sae.encode(x.float()).to_dense(), codes.to_dense())


def test_options_that_have_no_meaning_are_refused():
    for wrong in ({"kind": "lars"}, {"sign": "minus"}, {"steps": 0}, {"tol": -1.0}, {"gram": "maybe"}):
        with pytest.raises(InputError, match=str(next(iter(wrong.values())))):
            PursuitEncoder(**wrong)
    with pytest.raises(InputError, match="of kind 'mp', not 'omp'"):
        PursuitEncoder("omp", stop_on_repeat=True)
