"""ReLU with L1 against the oracles of sae_variants, section 1.1."""

import pytest
import torch

from mmsae import SAE, InputError
from mmsae.sae import L1, AffineEncoder, Dictionary, LossContext, Normaliser, Reconstruction, ReLU, TopK


def model(norm="free", selector=None, d=12, h=30, **kw):
    torch.manual_seed(0)
    sae = SAE(d, h, modalities=("image",), selector=selector or ReLU(), dictionaries={"shared": Dictionary(norm)}, **kw)
    x = {"image": torch.randn(64, d)}
    sae.fit_normaliser(x)
    return sae, x


@pytest.mark.parametrize("variance", [1.0, 4.0])
def test_the_best_code_of_one_atom_is_shrunk_by_half_the_coefficient(variance):
    sae = SAE(3, 1, modalities=("image",), selector=ReLU(), dictionaries={"shared": Dictionary(bias=False)})
    sae.normaliser.variance("image").fill_(variance)
    x = {"image": 1.0 * sae.dictionary("image").weight.detach()}  # c = 1
    optimizer = torch.optim.SGD(sae.encoder.parameters(), lr=0.05)
    for _ in range(400):
        out, ctx = sae(x), LossContext(sae)
        optimizer.zero_grad()
        (Reconstruction()(out, ctx) + L1(0.4, ramp=0.0)(out, ctx)).backward()
        optimizer.step()
    # error / V + 0.4 z / sqrt(V): c - 0.2 sqrt(V)
    assert float(sae.encode(x["image"]).values.detach()) == pytest.approx(1 - 0.2 * variance**0.5, abs=1e-3)


def test_the_weighted_loss_does_not_see_how_scale_is_shared_between_encoder_and_dictionary():
    sae, x = model()
    terms = [Reconstruction(), L1(0.3)]
    before = [float(t(sae(x), LossContext(sae))) for t in terms]
    plain = float(sae(x)["image"].codes.values.sum())
    scale = torch.rand(30) * 3 + 0.5
    with torch.no_grad():
        sae.dictionary("image").weight.mul_(scale[:, None])
        sae.encoder.weight.div_(scale[:, None])
        sae.encoder.bias.div_(scale)
    assert [float(t(sae(x), LossContext(sae))) for t in terms] == pytest.approx(before, rel=1e-5)
    assert float(sae(x)["image"].codes.values.sum()) != pytest.approx(plain, rel=0.1)


def test_values_are_the_formula_for_dense_sparse_and_signed_codes():
    for selector in (ReLU(), TopK(4), TopK(4, score="abs")):
        sae, x = model(selector=selector)
        out = sae(x)
        z, norms = out["image"].codes.to_dense(), sae.dictionary("image").weight.norm(dim=1)
        want = 0.3 * (z.abs() * norms).sum(1).mean() / sae.normaliser.variance("image").sqrt()
        torch.testing.assert_close(L1(0.3)(out, LossContext(sae)), want)
    assert (z < 0).any()
    gate = 0.3 * (out["image"].pre.dense().relu() * norms).sum(1).mean() / sae.normaliser.variance("image").sqrt()
    torch.testing.assert_close(L1(0.3, on="gate")(out, LossContext(sae)), gate)


def test_the_scale_of_the_data_has_no_effect():
    losses = []
    for scale in (1.0, 50.0):
        torch.manual_seed(0)
        sae = SAE(12, 30, modalities=("image",), selector=ReLU(), normaliser=Normaliser(centre=True))
        x = {"image": torch.randn(64, 12, generator=torch.Generator().manual_seed(1)) * scale}
        sae.fit_normaliser(x)
        losses.append(float(L1()(sae(x), LossContext(sae))))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_it_ramps_and_needs_unit_atoms_where_it_is_not_weighted():
    sae, x = model()
    out = sae(x)
    full, half = (float(L1(ramp=0.1)(out, LossContext(sae, progress=p))) for p in (1.0, 0.05))
    assert half == pytest.approx(full / 2, rel=1e-5) and full > 0
    for norm in ("free", "ball"):
        sae, x = model(norm)
        L1().check(sae)
        with pytest.raises(InputError, match=f"needs dictionaries of norm 'unit': image's is '{norm}'"):
            L1(weighted=False).check(sae)
    sae, x = model("unit", encoder=AffineEncoder())
    L1(weighted=False).check(sae)
    both = [float(L1(weighted=w)(sae(x), LossContext(sae))) for w in (True, False)]
    assert both[0] == pytest.approx(both[1], rel=1e-5)
    with pytest.raises(InputError, match="one of code, gate, not 'x'"):
        L1(on="x")
