"""g-SAE: its ranking, when it is TopK, what it refuses, and that its term predicts the host's loss."""

import pytest
import torch

from mmsae import SAE, InputError, Tokens
from mmsae.sae import GradientTopK, TopK


def made(selector, modalities=("image",), d=16, d_sae=40):
    torch.manual_seed(0)
    return SAE(d, d_sae, modalities=modalities, selector=selector).eval()


def rows(n=600, d=16, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g), torch.randn(n, d, generator=g)


def codes(sae, x, grad=None):
    tokens = Tokens.pooled({"image": x})._replace(grad=None if grad is None else {"image": grad})
    with torch.no_grad():
        return sae(tokens)["image"].codes.to_dense()


def known(selector, norm=1.0, **kw):
    """An SAE that knows the mean norm of gradients."""
    sae = made(selector, **kw)
    selector.sum_.fill_(norm)
    selector.weight_.fill_(1.0)
    return sae


def test_it_is_the_formula():
    x, g = rows()
    sae = known(GradientTopK(5, beta=2.0), norm=3.0)
    d = sae.dictionaries["shared"].weight.detach()
    u = x @ sae.encoder.weight.detach().T  # biases are 0
    top = (u.relu() * (1 + 2.0 * (g / 3.0 @ d.T).abs())).topk(5).indices
    want = torch.zeros_like(u).scatter(1, top, u.relu().gather(1, top))
    torch.testing.assert_close(codes(sae, x, g), want)
    plain = codes(made(TopK(5)), x)
    assert not torch.equal(want, plain)  # other latents, of the same values
    assert ((want != 0) & (plain == 0)).any() and torch.equal(want[(want != 0) & (plain != 0)].sort()[0],
                                                               plain[(want != 0) & (plain != 0)].sort()[0])  # fmt: skip


def test_a_factor_of_the_gradient_is_one_of_beta():
    x, g = rows()
    c = 4.0
    a, b = codes(known(GradientTopK(5, beta=0.5)), x, c * g), codes(known(GradientTopK(5, beta=0.5 * c)), x, g)
    assert torch.equal(a, b) and not torch.equal(a, codes(known(GradientTopK(5, beta=0.5)), x, g))


def test_in_training_the_unit_of_gradients_has_no_effect():
    x, g = rows()
    a, b = (made(GradientTopK(5)).train() for _ in range(2))
    for _ in range(3):
        assert torch.equal(codes(a, x, g), codes(b, x, 1024 * g))
    assert float(a.selector.sum_ / a.selector.weight_) == pytest.approx(float(g.norm(dim=1).mean()), rel=1e-5)


def test_gradients_that_are_0_do_not_count_in_the_mean_and_choose_as_topk():
    x, g = rows()
    g[:300] = 0
    sae = made(GradientTopK(5)).train()
    z = codes(sae, x, g)
    assert float(sae.selector.sum_ / sae.selector.weight_) == pytest.approx(float(g[300:].norm(dim=1).mean()), rel=1e-5)
    assert torch.equal(z[:300], codes(made(TopK(5)), x)[:300])
    sae = made(GradientTopK(5)).train()
    assert torch.equal(codes(sae, x, 0 * g), codes(made(TopK(5)), x))  # none so far, and no NaN


def test_a_gradient_across_all_atoms_is_topk():
    x, g = rows()
    sae, plain = known(GradientTopK(5)), made(TopK(5))
    with torch.no_grad():
        for model in (sae, plain):
            model.dictionaries["shared"].weight[:, 8:] = 0
    g[:, :8] = 0
    assert torch.equal(codes(sae, x, g), codes(plain, x))


def test_nothing_is_differentiated_through_the_ranking():
    x, g = rows(50)
    g.requires_grad_(True)
    sae = known(GradientTopK(5)).train()
    sae(Tokens.pooled({"image": x})._replace(grad={"image": g}))["image"].codes.values.sum().backward()
    assert g.grad is None and sae.dictionaries["shared"].weight.grad is None and sae.encoder.weight.grad.any()


def test_modalities_have_their_own_norms():
    x, g = rows(30)
    sae = made(GradientTopK(5), ("image", "text")).train()
    with torch.no_grad():
        sae(Tokens.pooled({"image": x, "text": x})._replace(grad={"image": g, "text": 9 * g}))
    image, text = sae.selector.sum_ / sae.selector.weight_
    assert float(text / image) == pytest.approx(9)


def test_without_a_gradient_the_mode_decides():
    x, _ = rows(20)
    assert torch.equal(codes(known(GradientTopK(5, without="topk")), x), codes(made(TopK(5)), x))
    with pytest.raises(InputError, match="to code with without='refuse', and these image rows have none"):
        codes(known(GradientTopK(5)), x)
    for without in ("topk", "refuse"):
        with pytest.raises(InputError, match="needs gradients of the host's loss to train"):
            codes(known(GradientTopK(5, without=without)).train(), x)
    with pytest.raises(InputError, match="without must be one of topk, refuse, not 'none'"):
        GradientTopK(5, without="none")


def test_its_term_predicts_what_ablating_a_latent_does_to_the_loss():
    """The host's loss is the cross-entropy of a small network; a hundredth of one latent is taken out of each row."""
    x, _ = rows(300)
    torch.manual_seed(2)
    host = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Tanh(), torch.nn.Linear(32, 5)).double()
    label = torch.randint(5, (300,))

    def loss(v):
        return torch.nn.functional.cross_entropy(host(v), label, reduction="none")

    point = x.double().requires_grad_(True)
    (g,) = torch.autograd.grad(loss(point).sum(), point)
    sae = known(GradientTopK(5, beta=1.0)).double()
    z, d = codes(sae, x.double(), g), sae.dictionaries["shared"].weight.detach()
    i = torch.where(z > 0, z, torch.inf).argmin(1)
    small = 0.01 * z.gather(1, i[:, None])
    with torch.no_grad():
        actual = loss(x.double() - small * d[i]) - loss(x.double())
    term = (g @ d.T).gather(1, i[:, None])
    predicted = -(small * term)[:, 0]
    assert torch.corrcoef(torch.stack([actual, predicted]))[0, 1] > 0.9999
    assert (actual - predicted).abs().max() < 0.02 * actual.abs().max()
    score = sae.selector.score(sae._pre(x.double(), "image", g)[1])(torch.ones(300, 40).double(), slice(None))
    torch.testing.assert_close(score.gather(1, i[:, None]), 1 + term.abs())
