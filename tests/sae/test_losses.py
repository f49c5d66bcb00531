"""Loss terms against the dense formula, and the oracles of TopK with AuxK (sae_variants, section 1.2)."""

import pytest
import torch
from torch.nn import functional as F

from mmsae import SAE, InputError
from mmsae.sae import (
    AuxK,
    CodeCosine,
    CodeInfoNCE,
    CrossReconstruction,
    Dictionary,
    DistanceEncoder,
    EnergyMatch,
    GroupSparse,
    LossContext,
    Normaliser,
    Reconstruction,
    TopK,
    UniversalReconstruction,
    UsageTracker,
)


def model(d=12, h=40, k=5, dictionaries=("image", "text"), seed=0, **kw):
    torch.manual_seed(seed)
    sae = SAE(
        d,
        h,
        selector=TopK(k),
        normaliser=Normaliser(centre=True),
        dictionaries={m: Dictionary() for m in dictionaries},
        **kw,
    )
    with torch.no_grad():
        for dictionary in sae.dictionaries.values():
            dictionary.bias.normal_(std=0.1)
            dictionary.weight.copy_(F.normalize(dictionary.weight + 0.3 * torch.randn_like(dictionary.weight)))
    x = {m: torch.randn(64, d) for m in sae.modalities}
    sae.fit_normaliser(x)
    return sae, x


def dense_forward(sae, x, m):
    """Naive dense TopK forward of one modality: (target, reconstruction, codes)."""
    target = sae.normaliser(x, m)[0]
    d = sae.dictionary(m)
    u = (target - d.bias) @ sae.encoder.weight.t() + sae.encoder.bias
    top = u.topk(sae.selector.k)
    z = torch.zeros_like(u).scatter(1, top.indices, top.values.relu())
    return target, z @ d.weight + d.bias, z


def with_dead(sae, dead):
    usage = UsageTracker(sae.d_sae, sae.modalities)
    usage.since[:, dead] = 10**6
    return usage


@pytest.mark.parametrize("dictionaries", [("shared",), ("image", "text")])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.double, 1e-9), (torch.float, 1e-6)])
def test_full_step_gradients_equal_dense_autograd(dtype, tolerance, dictionaries):
    sae, x = model(d=32, h=150, k=9, dictionaries=dictionaries)
    sae.to(dtype)
    x = {m: v.to(dtype) for m, v in x.items()}
    terms = [Reconstruction(), CodeCosine(0.3, ramp=0.0)]
    fast = sum(t(sae(x), LossContext(sae)) for t in terms)
    got = torch.autograd.grad(fast, tuple(sae.parameters()))
    naive, codes = 0.0, []
    for m, v in x.items():
        target, recon, z = dense_forward(sae, v, m)
        naive = naive + (target - recon).square().sum(1).mean() / sae.normaliser.variance(m) / 2
        codes.append(z)
    naive = naive + 0.3 * (1 - F.cosine_similarity(*codes).mean())
    want = torch.autograd.grad(naive, tuple(sae.parameters()))
    assert float(fast) == pytest.approx(float(naive), rel=1e-5)
    for a, b in zip(got, want, strict=True):
        assert (a - b).norm() / b.norm() < tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.double, 1e-9), (torch.float, 1e-5)])
def test_vl_sae_step_equals_the_published_dense_form(dtype, tolerance):
    """cdist, kthvalue mask, dense decoders, mean squared error: same loss, same gradients."""
    torch.manual_seed(1)
    dictionaries = {m: Dictionary(norm="free") for m in ("image", "text")}
    sae = SAE(32, 150, encoder=DistanceEncoder(), selector=TopK(20, strict=True), dictionaries=dictionaries).to(dtype)
    x = {m: torch.randn(64, 32, dtype=dtype) for m in sae.modalities}
    fast = Reconstruction("mse")(sae(x), LossContext(sae))
    got = torch.autograd.grad(fast, tuple(sae.parameters()))
    naive = 0.0
    for m, v in x.items():
        a = 2 - torch.cdist(
            F.normalize(v), F.normalize(sae.encoder.weight), compute_mode="donot_use_mm_for_euclid_dist"
        )
        threshold = a.detach().kthvalue(150 - 20, dim=1, keepdim=True).values
        d = sae.dictionaries[m]
        naive = naive + F.mse_loss((a * (a > threshold)) @ d.weight + d.bias, v)
    want = torch.autograd.grad(naive, tuple(sae.parameters()))
    assert float(fast.detach()) == pytest.approx(float(naive.detach()), rel=1e-5)
    for g, w in zip(got, want, strict=True):
        assert (g - w).norm() / w.norm() < tolerance


def test_reductions_differ_by_known_factors():
    sae, x = model()
    out, ctx = sae(x), LossContext(sae)
    errors = {m: float((o.target - o.recon).detach().square().sum(1).mean()) for m, o in out.items()}
    assert float(Reconstruction("sum")(out, ctx)) == pytest.approx(sum(errors.values()) / 2, rel=1e-5)
    assert float(Reconstruction("mse")(out, ctx)) == pytest.approx(sum(errors.values()) / 12, rel=1e-5)
    fvu = sum(e / float(sae.normaliser.variance(m)) for m, e in errors.items()) / 2
    assert float(Reconstruction("fvu")(out, ctx)) == pytest.approx(fvu, rel=1e-5)


def test_auxk_is_the_formula_without_decoder_bias():
    sae, x = model()
    dead = torch.tensor([1, 4, 7, 30])
    out = sae(x)
    got = AuxK(1 / 32, k_aux=2, dead_after=100)(out, LossContext(sae, with_dead(sae, dead)))
    want = 0.0
    for m, v in x.items():
        target, recon, _ = dense_forward(sae, v, m)
        e = target - recon
        u = ((target - sae.dictionary(m).bias) @ sae.encoder.weight.t() + sae.encoder.bias)[:, dead].relu()
        top = u.topk(2)
        z = torch.zeros_like(u).scatter(1, top.indices, top.values)
        aux = (e - z @ sae.dictionary(m).weight[dead]).square().sum(1).mean()
        want = want + aux / (e - e.mean(0)).square().sum(1).mean() / 2 / 32
    torch.testing.assert_close(got, want, rtol=1e-4, atol=0)


def test_auxk_trains_dead_latents_only():
    sae, x = model()
    dead = torch.tensor([1, 4, 7, 30])
    loss = AuxK(dead_after=100)(sae(x), LossContext(sae, with_dead(sae, dead)))
    sae.zero_grad()
    loss.backward()
    live = torch.ones(40, dtype=torch.bool)
    live[dead] = False
    for w in (sae.encoder.weight.grad, sae.dictionary("image").weight.grad, sae.dictionary("text").weight.grad):
        assert (w[live] == 0).all() and (w[dead] != 0).any()


def test_auxk_of_signed_codes_ranks_by_size_and_keeps_signs():
    sae, x = model()
    sae.selector = TopK(5, score="abs")
    dead = torch.tensor([1, 4, 7, 30])
    ctx = LossContext(sae, with_dead(sae, dead))
    out = {"image": sae(x)["image"]}
    got = AuxK(1.0, k_aux=2, dead_after=100)(out, ctx)
    e = (out["image"].target - out["image"].recon).detach()
    u = out["image"].pre.dense()[:, dead]
    z = torch.zeros_like(u).scatter(1, top := u.abs().topk(2).indices, u.gather(1, top))
    aux = (e - z @ sae.dictionary("image").weight[dead]).square().sum(1).mean()
    assert (z < 0).any() and ((z != 0).sum(1) == 2).all()
    torch.testing.assert_close(got, aux / (e - e.mean(0)).square().sum(1).mean())
    assert torch.equal(got, AuxK(1.0, k_aux=2, dead_after=100, score="abs")(out, ctx))
    assert not torch.equal(got, AuxK(1.0, k_aux=2, dead_after=100, score="value")(out, ctx))
    live = torch.ones(40, dtype=torch.bool)
    live[dead] = False
    (grad,) = torch.autograd.grad(got, sae.encoder.weight)
    assert (grad[live] == 0).all() and grad[dead].any()
    with pytest.raises(InputError, match="'value' or 'abs', not 'norm'"):
        AuxK(score="norm")


def test_auxk_with_more_k_than_dead_latents_and_with_none_dead():
    sae, x = model()
    ctx = LossContext(sae, with_dead(sae, torch.tensor([3])))
    assert torch.isfinite(AuxK(k_aux=50, dead_after=100)(sae(x), ctx))
    none = LossContext(sae, UsageTracker(40, sae.modalities))
    assert float(AuxK(dead_after=1)(sae(x), none)) == 0.0


def train(terms, steps=5):
    sae, x = model(h=300)
    usage = UsageTracker(300, sae.modalities)
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-2)
    for _ in range(steps):
        out = sae(x)
        loss = torch.stack([t(out, LossContext(sae, usage)) for t in terms]).sum()
        usage.update({m: o.codes for m, o in out.items()})
        optimizer.zero_grad()
        loss.backward()
        sae.remove_parallel_grad_()
        optimizer.step()
        sae.project_()
    return sae


def test_auxk_of_one_row_has_no_unit_and_so_no_gradient():
    sae, x = model()
    usage = UsageTracker(sae.d_sae, sae.modalities)
    usage.since += 10
    loss = AuxK(dead_after=10)(sae({m: v[:1] for m, v in x.items()}), LossContext(sae, usage))
    loss.backward()
    assert loss == 0 and all(p.grad is None or not p.grad.any() for p in sae.parameters())


def test_coefficient_zero_equals_plain_topk_bitwise():
    plain, zero = train([Reconstruction()]), train([Reconstruction(), AuxK(0.0, dead_after=1)])
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), zero.parameters(), strict=True))
    used = train([Reconstruction(), AuxK(1.0, dead_after=1)])
    assert not torch.equal(plain.encoder.weight, used.encoder.weight)


def test_the_step_keeps_atoms_on_the_sphere_with_tangent_gradients():
    sae, x = model()
    Reconstruction()(sae(x), LossContext(sae)).backward()
    sae.remove_parallel_grad_()
    for d in sae.dictionaries.values():
        assert float((d.weight.grad * d.weight).sum(1).abs().max()) < 1e-6
    for d in train([Reconstruction()]).dictionaries.values():
        torch.testing.assert_close(d.weight.norm(dim=1), torch.ones(300))


def test_cosine_ramps_masks_and_needs_pairs():
    sae, x = model()
    out = sae(x)
    full = float(CodeCosine(0.2, ramp=0.1)(out, LossContext(sae, progress=0.5)))
    assert float(CodeCosine(0.2, ramp=0.1)(out, LossContext(sae, progress=0.05))) == pytest.approx(full / 2, rel=1e-5)
    assert float(CodeCosine(0.2)(out, LossContext(sae, progress=0.0))) == 0.0
    assert float(CodeCosine(0.2, mask_top=1)(out, LossContext(sae))) != pytest.approx(full, rel=1e-3)
    with pytest.raises(InputError, match="needs pairs"):
        CodeCosine()({"image": out["image"]}, LossContext(sae))
    with pytest.raises(InputError, match="'image': 64, 'text': 60"):
        CodeCosine()(sae({"image": x["image"], "text": x["text"][:60]}), LossContext(sae))


def test_shuffled_cosine_is_added_and_codes_that_are_alike_gain_nothing():
    sae, x = model()
    out = sae(x)
    z = {m: F.normalize(o.codes.to_dense(), dim=1) for m, o in out.items()}
    pair = (z["image"] * z["text"]).sum(1).mean()
    shuffled = (z["image"] * z["text"].roll(1, 0)).sum(1).mean()
    terms = [CodeCosine(0.2, ramp=0.0, shuffled=s)(out, LossContext(sae)) for s in (0.0, 0.5)]
    torch.testing.assert_close(torch.stack(terms), 0.2 * torch.stack([1 - pair, 1 - pair + 0.5 * shuffled]))
    terms[1].backward()
    sparse = sae.encoder.weight.grad.clone()
    sae.zero_grad()
    z = {m: F.normalize(dense_forward(sae, x[m], m)[2], dim=1) for m in x}
    a, b = z["image"], z["text"]
    (0.2 * (1 - (a * b).sum(1).mean() + 0.5 * (a * b.roll(1, 0)).sum(1).mean())).backward()
    torch.testing.assert_close(sparse, sae.encoder.weight.grad)

    same = sae({m: x["image"][:1].expand(8, -1) for m in x})
    same["text"] = same["image"]  # the worst hub: all codes are the same
    assert float(CodeCosine(0.2, ramp=0.0)(same, LossContext(sae))) == pytest.approx(0.0, abs=1e-6)
    assert float(CodeCosine(0.2, ramp=0.0, shuffled=1.0)(same, LossContext(sae))) == pytest.approx(0.2)


@pytest.mark.parametrize(
    "term", [CodeCosine, CodeInfoNCE, CrossReconstruction, EnergyMatch, GroupSparse, UniversalReconstruction]
)
def test_terms_that_compare_modalities_refuse_an_sae_of_one_when_a_training_is_composed(term):
    with pytest.raises(InputError, match=rf"loss '{term.name}' compares 2 modalities, this SAE has \['image'\]"):
        term().check(SAE(8, 12, modalities=["image"], selector=TopK(2)))
