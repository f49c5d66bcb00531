import pytest
import torch

from mmsae import SAE, InputError
from mmsae.sae import (
    Dictionary,
    GaussianEncoder,
    KLGaussian,
    LossContext,
    PerModalityEncoder,
    TopK,
)
from mmsae.sae.variants.vsae import kl_to_normal
from tests.helpers.recipes import Run, batch


def small(encoder, d_sae=48, k=4, score="abs", modalities=("image",)):
    torch.manual_seed(0)
    sae = SAE(16, d_sae, modalities=modalities, encoder=encoder, selector=TopK(k, score=score))
    sae.fit_normaliser(batch(sae, 256, seed=9).x)
    return sae.train()


def codes(sae, n=64):
    return sae(batch(sae, n))["image"].codes.to_dense()


def test_the_divergence_is_that_of_torch_and_of_samples():
    torch.manual_seed(0)
    mean, log_variance = torch.randn(30, dtype=torch.float64), torch.randn(30, dtype=torch.float64) - 1
    posterior = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    prior = torch.distributions.Normal(torch.zeros(30, dtype=torch.float64), 1.0)
    got = kl_to_normal(mean, log_variance)
    torch.testing.assert_close(got, torch.distributions.kl_divergence(posterior, prior))
    drawn = posterior.sample((100_000,))
    sampled = (posterior.log_prob(drawn) - prior.log_prob(drawn)).mean(0).sum()
    assert float(sampled) == pytest.approx(float(got.sum()), rel=5e-3)
    assert kl_to_normal(torch.zeros(3), torch.zeros(3)).eq(0).all() and kl_to_normal(torch.zeros(3)).eq(0).all()
    assert torch.equal(kl_to_normal(mean), mean.square() / 2)


def test_training_samples_and_evaluation_does_not():
    sae = small(GaussianEncoder(), score="abs")
    first, second = codes(sae), codes(sae)
    assert not torch.equal(first, second) and (first < 0).any()
    assert ((first != 0).sum(1) == 4).all()
    means = codes(sae.eval())
    assert torch.equal(means, codes(sae)) and (means >= 0).all()
    mean = sae(batch(sae, 64))["image"].pre.extras["mean"]
    torch.testing.assert_close(means, mean * (mean >= mean.topk(4).values[:, -1:]))


def test_noise_goes_on_where_it_stopped_and_differs_between_modalities():
    sae, other = (small(PerModalityEncoder(GaussianEncoder()), modalities=("image", "text")) for _ in range(2))
    codes(sae)
    other.load_state_dict(sae.state_dict())
    tokens = batch(sae, 30)._replace(x={"image": torch.ones(30, 16), "text": torch.ones(30, 16)})
    a, b = sae(tokens), other(tokens)
    assert all(torch.equal(a[m].pre.u, b[m].pre.u) for m in a)
    noise = {m: (a[m].pre.u - a[m].pre.extras["mean"]) / (0.5 * a[m].pre.extras["log_variance"]).exp() for m in a}
    assert all(abs(float(v.mean())) < 0.1 and abs(float(v.std()) - 1) < 0.1 for v in noise.values())
    assert abs(float((noise["image"] * noise["text"]).mean())) < 0.1
    shared = small(GaussianEncoder(), modalities=("image", "text"))(tokens)
    assert not torch.equal(shared["image"].pre.u, shared["text"].pre.u)


def test_noise_of_idle_latents_wins_unless_they_are_chosen_before_it():
    torch.manual_seed(0)
    worst = {}
    for sample in ("before", "after"):
        sae = SAE(8, 2048, modalities=["image"], encoder=GaussianEncoder(sample=sample), selector=TopK(64, score="abs"))
        with torch.no_grad():
            sae.encoder.weight.zero_()
            sae.encoder.spread.zero_()
            sae.encoder.spread_bias.zero_()
            sae.encoder.bias[:64] = 1.0  # what ought to be chosen; all others have mean 0, and sigma is 1
        out = sae.train().encode(torch.zeros(100, 8))
        worst[sample] = float((out.indices < 64).float().mean())
        if sample == "before":
            assert float(out.values.abs().amin(1).mean()) == pytest.approx(2.16, abs=0.15)
        else:
            assert float(out.values.mean()) == pytest.approx(1.0, abs=0.05)
            assert float(out.values.std()) == pytest.approx(1.0, abs=0.05)
    assert worst["after"] == 1.0 and worst["before"] < 0.3


@pytest.mark.parametrize("learned", [True, False])
def test_the_term_of_the_selected_is_less_and_both_follow_the_ramp(learned):
    sae = small(GaussianEncoder(learned))
    out = sae(batch(sae, 64))
    whole, part = (KLGaussian(0.5, mask)(out, LossContext(sae)) for mask in ("all", "selected"))
    extras = out["image"].pre.extras
    kl = kl_to_normal(extras["mean"], extras["log_variance"])
    torch.testing.assert_close(whole, 0.5 * kl.sum(1).mean())
    torch.testing.assert_close(part, 0.5 * kl.gather(1, out["image"].codes.indices).sum(1).mean())
    assert 0 < part < whole
    torch.testing.assert_close(KLGaussian(0.5)(out, LossContext(sae, progress=0.05)), whole / 2)
    dense = out["image"]._replace(codes=out["image"].codes._replace(values=codes(sae), indices=None))
    assert 0 < KLGaussian(0.5, "selected")({"image": dense}, LossContext(sae)) < whole


def test_the_term_pulls_means_to_0_and_variances_to_1():
    torch.manual_seed(0)
    sae = SAE(
        16,
        48,
        modalities=["image"],
        encoder=GaussianEncoder(),
        selector=TopK(4, score="abs"),
        dictionaries={"shared": Dictionary(norm="free")},
    )
    sae.fit_normaliser(batch(sae, 256, seed=9).x)
    Run(sae, [KLGaussian(1.0, ramp=0.0)], lr=3e-2).go(150)
    extras = sae.eval()(batch(sae, 64))["image"].pre.extras
    assert extras["mean"].abs().mean() < 0.05 and extras["log_variance"].abs().mean() < 0.2


def test_what_does_not_go_together_is_refused():
    with pytest.raises(InputError, match="'gaussian', this SAE's encoder is 'affine'"):
        KLGaussian().check(SAE())
    KLGaussian().check(SAE(encoder=PerModalityEncoder(GaussianEncoder())))
    with pytest.raises(InputError, match="'before' or 'after' the selection, not 'never'"):
        GaussianEncoder(sample="never")
    with pytest.raises(InputError, match="'all' or 'selected', not 'some'"):
        KLGaussian(mask="some")
