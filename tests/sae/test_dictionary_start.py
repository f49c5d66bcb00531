"""Where nothing centres, an SAE starts at the mean of its data: latents can fire, the random control is no straw."""

import pytest
import torch

from mmsae import SAE, Tokens
from mmsae.sae import (
    AffineEncoder,
    AuxK,
    Dictionary,
    DistanceEncoder,
    LossContext,
    Normaliser,
    PerModalityEncoder,
    Reconstruction,
    TopK,
    UsageTracker,
    random_control,
)
from mmsae.sae.usage import fired_counts

MEANS = {"image": 6.0, "text": -1.0}


def rows(modalities=("image",), d=96, n=500):
    """Of a real host's kind (CLS): .97 of the second moment (image) is that of the mean."""
    g = torch.Generator().manual_seed(0)
    return {m: torch.randn(n, d, generator=g) + MEANS[m] for m in modalities}


def build(x, d_sae=256, **kw):
    torch.manual_seed(0)
    sae = SAE({m: v.shape[1] for m, v in x.items()}, d_sae, modalities=list(x), selector=TopK(8), **kw)
    sae.fit_normaliser(x)
    return sae


def fvu(sae, x, m="image"):
    with torch.no_grad():
        x_hat = sae.decode(sae.encode(x[m], m))
    return float((x[m] - x_hat).square().sum() / (x[m] - x[m].mean(0)).square().sum())


def alive(sae, x, m="image"):
    """Share of latents that fire on some row."""
    with torch.no_grad():
        return float((fired_counts(sae.encode(x[m], m)) > 0).float().mean())


def at_zero(sae):
    with torch.no_grad():
        for d in sae.dictionaries.values():
            d.bias.zero_()
    return sae


@pytest.mark.parametrize("normaliser", [{}, {"scale": "rms"}, {"unit_in": True}])
def test_all_latents_can_fire_at_step_0_and_the_random_control_beats_the_mean(normaliser):
    x = rows()
    sae = build(x, normaliser=Normaliser(**normaliser))
    assert alive(sae, x) > 0.99 and fvu(sae, x) < 1
    control = random_control(sae, seed=1)
    assert alive(control, x) > 0.99 and fvu(control, x) < 1
    assert alive(at_zero(sae), x) < 0.7 and fvu(at_zero(control), x) > 1  # what it was


def test_the_bias_is_the_mean_in_the_units_of_the_decoder():
    x = rows(("image", "text"))
    own = build(x, normaliser=Normaliser(scale="rms"), dictionaries={m: Dictionary() for m in x})
    for m, v in x.items():
        rms = v.square().sum(1).mean().sqrt()
        torch.testing.assert_close(own.dictionaries[m].bias.detach(), v.mean(0) / rms)
    shared = build(x)
    torch.testing.assert_close(
        shared.dictionaries["shared"].bias.detach(), (x["image"].mean(0) + x["text"].mean(0)) / 2
    )
    assert fvu(build(x, encoder=DistanceEncoder(), dictionaries={m: Dictionary("free") for m in x}), x) < 2


@pytest.mark.parametrize("wrap", [lambda e: e, PerModalityEncoder])
def test_an_encoder_that_does_not_subtract_the_bias_starts_with_the_same_pre_codes(wrap):
    x = rows()
    subtracts = build(x, encoder=wrap(AffineEncoder()))
    does_not = build(x, encoder=wrap(AffineEncoder(subtract_decoder_bias=False)))
    a, b = (sae(x)["image"].pre.dense().detach() for sae in (subtracts, does_not))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert alive(random_control(does_not), x) > 0.99


def test_what_centres_or_has_no_bias_starts_as_before():
    x = rows()
    centred = build(x, normaliser=Normaliser(unit_in=True, centre=True, unit_out=True))
    assert not centred.dictionaries["shared"].bias.any() and not centred.encoder.bias.any()
    assert not random_control(centred).dictionaries["shared"].bias.any()
    bare = build(x, encoder=AffineEncoder(subtract_decoder_bias=False), dictionaries={"shared": Dictionary(bias=False)})
    assert not bare.encoder.bias.any()


def test_weights_that_were_trained_are_never_overwritten(tmp_path):
    x, sae = rows(), build(rows())
    with torch.no_grad():
        sae.dictionaries["shared"].bias.fill_(7.0)
    sae.normaliser.variance("image").fill_(float("nan"))  # as in an imported SAE: fine-tuning fits its normaliser
    loaded = SAE.from_pretrained(sae.save_pretrained(tmp_path / "sae"))
    filled = SAE(96, 256, modalities=["image"], selector=TopK(8))
    filled.load_state_dict(sae.state_dict())
    for trained in (loaded, filled):
        assert not trained.normaliser.fitted
        trained.fit_normaliser(x)
        assert (trained.dictionaries["shared"].bias == 7.0).all()


def test_the_control_of_an_sae_that_does_not_know_the_mean_takes_its_bias(tmp_path):
    x, sae = rows(), build(rows())
    sae.normaliser.mean("image").zero_()
    control = random_control(SAE.from_pretrained(sae.double().save_pretrained(tmp_path / "sae")))
    torch.testing.assert_close(control.dictionaries["shared"].bias.detach(), x["image"].mean(0))
    assert fvu(control, x) < 1


def test_a_short_training_leaves_no_latent_behind():
    """With the bias at 0 most latents never fire again: their pre-codes are negative everywhere, for AuxK too."""
    x = rows()
    never = {}
    for start in ("mean", "zero"):
        sae = build(x) if start == "mean" else at_zero(build(x))
        usage, losses = UsageTracker(sae.d_sae, sae.modalities), [Reconstruction(), AuxK(dead_after=2000)]
        optimizer = torch.optim.Adam(sae.parameters(), 1e-3)
        for _ in range(60):
            outputs = sae(Tokens.pooled(x))
            optimizer.zero_grad()
            sum(term(outputs, LossContext(sae, usage)) for term in losses).backward()
            sae.remove_parallel_grad_()
            optimizer.step()
            sae.project_()
            usage.update({m: o.codes for m, o in outputs.items()})
        never[start] = 1 - alive(sae, x)
    assert never["mean"] < 0.01 and never["zero"] > 0.3
