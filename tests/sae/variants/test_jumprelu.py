"""JumpReLU and its penalties against the oracles of sae_variants, section 1.4."""

import math

import pytest
import torch

from mmsae import SAE, InputError
from mmsae.sae import (
    L0,
    Dictionary,
    JumpReLU,
    LossContext,
    PreActRevive,
    Reconstruction,
    ReLU,
    TanhL0,
    UsageTracker,
)
from mmsae.sae.variants.jumprelu import step


def model(d=12, h=30, selector=None, norm="unit", modalities=("image",)):
    torch.manual_seed(0)
    selector = selector or JumpReLU(0.3, 0.4)
    sae = SAE(d, h, modalities=modalities, selector=selector, dictionaries={"shared": Dictionary(norm)}).double()
    x = {m: torch.randn(200, d).double() for m in modalities}
    sae.fit_normaliser(x)
    with torch.no_grad():
        sae.encoder.bias.normal_(std=0.2)
        if isinstance(selector, JumpReLU):
            sae.selector.thresholds.add_(0.2 * torch.randn_like(sae.selector.thresholds))
    return sae, x


@pytest.mark.parametrize("bandwidth", [0.5, 0.1])
def test_the_straight_through_gradient_is_the_density_at_the_threshold(bandwidth):
    u = torch.randn(2_000_000, 1, generator=torch.Generator().manual_seed(0))
    theta = torch.tensor([0.7], requires_grad=True)
    step(u, theta, bandwidth).mean().backward()
    phi = math.exp(-(0.7**2) / 2) / math.sqrt(2 * math.pi)
    assert float(theta.grad) == pytest.approx(-phi, rel=0.01)


def naive(u, theta, eps, grad):
    """Gradients of ``sum(grad * z)``: for u, and for theta by the paper's rule."""
    near = ((u - theta).abs() < eps / 2).double()
    return grad * (u > theta), -(theta / eps) * (near * grad).sum(0)


@pytest.mark.parametrize(("start", "eps"), [(0.3, 0.4), (0.1, 2.0)])
@pytest.mark.parametrize("log", [True, False])
def test_codes_and_gradients_are_the_formulas_of_the_paper(log, start, eps):
    sae, x = model(selector=JumpReLU(start, eps, log=log))
    own = sae.selector.thresholds
    theta = (own.exp() if log else own).detach()[0]
    out = sae(x)["image"]
    u, z = out.pre.dense(), out.codes.values
    assert torch.equal(z, torch.where((u > theta) & (u > 0), u, 0.0)) and (u < 0).any()
    grad = torch.randn(z.shape, generator=torch.Generator().manual_seed(1), dtype=torch.double)
    got = torch.autograd.grad((grad * z).sum(), (u, own), retain_graph=True)
    want = naive(u.detach(), theta, eps, grad)
    chain = theta if log else 1.0  # d theta / d log theta
    torch.testing.assert_close(got[0], want[0] * (u > 0))
    torch.testing.assert_close(got[1][0], want[1] * chain)
    count = L0(1.0, ramp=0.0)({"image": out}, LossContext(sae))
    assert float(count) == pytest.approx(float((u > theta).sum(1).double().mean()))
    for_u, for_theta = torch.autograd.grad(count, (u, own), allow_unused=True)
    near = ((u - theta).abs() < eps / 2).double()
    assert for_u is None
    torch.testing.assert_close(for_theta[0], -near.mean(0) / eps * chain)


def test_evaluation_is_the_same_code_and_a_threshold_near_0_is_relu():
    sae, x = model()
    train, evaluation = (sae.train(t)(x)["image"].codes.to_dense() for t in (True, False))
    torch.testing.assert_close(train, evaluation, rtol=1e-12, atol=1e-12)
    jump, _ = model(selector=JumpReLU(1e-12, 1e-12))
    jump.selector.thresholds.data.fill_(math.log(1e-12))
    relu, _ = model(selector=ReLU())
    for t in (True, False):
        a, b = (s.train(t)(x)["image"].codes.to_dense() for s in (jump, relu))
        assert (b > 0).any()
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_l0_towards_a_target_pulls_thresholds_both_ways():
    sae, x = model()
    l0 = float(sae(x)["image"].codes.l0().double().mean())
    for target, sign in ((l0 / 2, -1), (l0 * 2, 1)):
        loss = L0(0.1, target=target, ramp=0.0)(sae(x), LossContext(sae))
        assert float(loss.detach()) == pytest.approx(0.1 * (l0 / target - 1) ** 2)
        grad = torch.autograd.grad(loss, sae.selector.thresholds)[0]
        assert (grad * sign >= 0).all() and grad.any()


def test_the_tanh_form_is_the_formula_and_counts_as_it_steepens():
    sae, x = model(norm="free")
    out = sae(x)
    z, d = out["image"].codes.values, sae.dictionary("image").weight
    got = TanhL0(0.2, c=4.0, ramp=0.0)(out, LossContext(sae))
    torch.testing.assert_close(got, 0.2 * (4 * z * d.norm(dim=1)).tanh().sum(1).mean())
    weights = (sae.selector.thresholds, sae.encoder.weight, d)
    assert all(g.any() for g in torch.autograd.grad(got, weights))
    steep = TanhL0(1.0, c=1e9)(out, LossContext(sae))
    assert float(steep.detach()) == pytest.approx(float(out["image"].codes.l0().double().mean()))
    half = TanhL0(0.2)(out, LossContext(sae, progress=0.5))  # the published ramp takes the whole training
    assert float(half.detach()) == pytest.approx(float(got.detach()) / 2)
    sparse = {"image": sae.eval()(x)["image"]}
    torch.testing.assert_close(TanhL0(0.2, ramp=0.0)(sparse, LossContext(sae)), got)


def test_revive_pulls_dead_latents_up_and_leaves_the_others():
    sae, x = model(norm="free")
    dead = torch.tensor([2, 5, 11])
    usage = UsageTracker(30, sae.modalities)
    usage.since[:, dead] = 100
    out, ctx = sae(x), LossContext(sae, usage)
    got = PreActRevive(0.3, dead_after=100)(out, ctx)
    u, theta = out["image"].pre.dense(), sae.selector.threshold("image")
    below = (theta - u).relu() * sae.dictionary("image").weight.norm(dim=1)
    torch.testing.assert_close(got, 0.3 * below[:, dead].sum(1).mean() / sae.normaliser.variance("image").sqrt())
    bias, theta, atoms = torch.autograd.grad(
        got, (sae.encoder.bias, sae.selector.thresholds, sae.dictionary("image").weight), allow_unused=True
    )
    assert (bias[dead] < 0).all() and (theta[0, dead] > 0).all() and atoms is None
    assert bias.count_nonzero() == theta.count_nonzero() == 3
    assert float(PreActRevive(dead_after=101)(out, ctx)) == float(PreActRevive()(out, LossContext(sae))) == 0.0


def test_thresholds_of_every_modality():
    sae, x = model(selector=JumpReLU(0.3, 0.4, per_modality=True), modalities=("image", "text"))
    assert sae.selector.thresholds.shape == (2, 30)
    Reconstruction()({"image": sae(x)["image"]}, LossContext(sae)).backward()
    assert sae.selector.thresholds.grad[0].any() and not sae.selector.thresholds.grad[1].any()


def test_what_has_no_meaning_is_refused():
    sae, _ = model(selector=ReLU())
    for term in (L0(), PreActRevive()):
        with pytest.raises(InputError, match=f"{term.name} trains the thresholds of selector 'jumprelu'"):
            term.check(sae)
    for make in (lambda: JumpReLU(0.0), lambda: JumpReLU(bandwidth=0.0), lambda: L0(target=0.0), lambda: TanhL0(c=0.0)):
        with pytest.raises(InputError, match="must be above 0"):
            make()
