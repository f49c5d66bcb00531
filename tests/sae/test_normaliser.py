import pytest
import torch
from torch.nn import functional as F

from mmsae import SAE, InputError
from mmsae.sae import Normaliser

ROWS = {"unit_in": True, "centre": True, "unit_out": True}
FLAGS = [
    {}, {"unit_in": True}, {"centre": True}, {"unit_out": True}, {"scale": "rms"}, {"centre": True, "scale": "rms"},
    ROWS, {**ROWS, "scale": "rms"},
]  # fmt: skip


def fitted(sample, **flags):
    n = Normaliser(**flags)
    n.build({m: x.shape[1] for m, x in sample.items()})
    n.fit(sample)
    return n


@pytest.fixture
def sample():
    torch.manual_seed(0)
    return {"image": 3 * torch.randn(400, 6) + 5, "text": torch.randn(300, 6) - 2}


@pytest.mark.parametrize("flags", FLAGS)
def test_invert_undoes_everything(sample, flags):
    n = fitted(sample, **flags)
    for m, x in sample.items():
        y, info = n(x, m)
        torch.testing.assert_close(n.invert(y, m, info), x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("flags", FLAGS)
def test_variance_is_the_total_variance_of_the_normalised_rows(sample, flags):
    n = fitted(sample, **flags)
    for m, x in sample.items():
        y = n(x, m)[0].double()
        torch.testing.assert_close(n.variance(m).double(), (y - y.mean(0)).square().sum(1).mean(), rtol=1e-5, atol=0)


def test_the_composition_is_norm_mean_norm_per_modality(sample):
    n = fitted(sample, unit_in=True, centre=True, unit_out=True)
    for m, x in sample.items():
        unit = F.normalize(x)
        torch.testing.assert_close(n(x, m)[0], F.normalize(unit - unit.mean(0)), rtol=1e-4, atol=1e-5)


def test_rms_makes_the_mean_squared_norm_one(sample):
    n = fitted(sample, centre=True, scale="rms")
    for m, x in sample.items():
        assert float(n(x, m)[0].square().sum(1).mean()) == pytest.approx(1, abs=1e-4)


def test_parts_and_whole_fit_equally(sample):
    whole = fitted(sample, unit_in=True, centre=True, unit_out=True)
    parts = Normaliser(unit_in=True, centre=True, unit_out=True)
    parts.build({m: 6 for m in sample})
    parts.fit({m: list(x.split(37)) for m, x in sample.items()})
    for name, buffer in whole.named_buffers():
        torch.testing.assert_close(dict(parts.named_buffers())[name], buffer)


def test_fitting_again_gives_the_same(sample):
    n = fitted(sample, unit_in=True, centre=True, scale="rms", unit_out=True)
    before = {k: v.clone() for k, v in n.named_buffers()}
    n.fit(sample)
    assert all(torch.equal(v, before[k]) for k, v in n.named_buffers())


def test_decoding_without_info_under_a_per_row_normaliser_raises(sample):
    n = fitted(sample, unit_out=True)
    with pytest.raises(InputError, match="info"):
        n.invert(sample["image"], "image", None)


def test_bad_samples_are_named(sample):
    n = Normaliser(centre=True)
    n.build({"image": 6, "text": 6})
    with pytest.raises(InputError, match="no text activations"):
        n.fit({"image": sample["image"]})
    with pytest.raises(InputError, match="image activations do not vary"):
        n.fit({"image": torch.ones(5, 6), "text": sample["text"]})
    assert not n.fitted
    with pytest.raises(InputError, match="scale must be"):
        Normaliser(scale="std")


def test_rows_that_are_not_finite_are_said_to_be_so():
    x = torch.randn(20, 4)
    x[3, 1] = float("nan")
    with pytest.raises(InputError, match=r"some of the 20 image rows to fit on are not finite"):
        SAE(4, 64, modalities=["image"]).fit_normaliser({"image": x})


def test_rows_are_standardised_one_by_one_and_brought_back_as_saelens_does():
    n, x = Normaliser(standardise=True), 3 * torch.randn(50, 6) + 2
    n.build({"image": 6})
    n.fit({"image": x})
    y, info = n(x, "image")
    mean, std = x.mean(1, keepdim=True), x.std(1, keepdim=True)
    torch.testing.assert_close(y, (x - mean) / (std + 1e-5))
    torch.testing.assert_close(n.invert(y, "image", info), y * std + mean)
    torch.testing.assert_close(n.gradient(torch.ones(50, 6), "image", info), std.expand(50, 6))
    assert n.per_row and n.config() == Normaliser().config() | {"standardise": True}
    with pytest.raises(InputError, match="unit_in and standardise are both true"):
        Normaliser(unit_in=True, standardise=True)


def test_means_and_scales_are_fitted_on_standardised_rows():
    n, x = Normaliser(standardise=True, centre=True, scale="rms"), 3 * torch.randn(50, 6) + 2
    n.build({"image": 6})
    n.fit({"image": x})
    y, info = n(x, "image")
    torch.testing.assert_close(y.square().sum(1).mean(), torch.tensor(1.0))
    torch.testing.assert_close(y.mean(0), torch.zeros(6), atol=1e-6, rtol=0)
    torch.testing.assert_close(n.invert(y, "image", info), x, atol=1e-4, rtol=1e-4)


def test_a_normaliser_that_standardises_nothing_has_the_config_it_always_had():
    assert Normaliser().config() == {"unit_in": False, "centre": False, "scale": "none", "unit_out": False}
