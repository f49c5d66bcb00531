"""Untrained SAEs are as sparse as the trained one: by a first batch, or latent by latent by the rows that are given."""

import pytest
import torch

from mmsae import SAE
from mmsae.sae import BatchTopK, FeatureChoice, JumpReLU, Normaliser, ReLU, TopK, random_control, to_jumprelu
from mmsae.sae.random_control import needs_rows
from mmsae.types import InputError


@pytest.mark.parametrize("selector", [BatchTopK, FeatureChoice])
@pytest.mark.parametrize("normaliser", [{}, {"centre": True, "scale": "rms"}, {"centre": True, "unit_out": True}])
def test_a_control_without_training_fires_about_as_often_as_its_budget_says(selector, normaliser):
    torch.manual_seed(1)
    sae = SAE(32, 256, modalities=["image"], selector=selector(6), normaliser=Normaliser(**normaliser))
    x = 5 * torch.randn(2000, 32) + 3
    sae.fit_normaliser({"image": x})
    sae.train()({"image": x})
    control = random_control(sae.eval())
    l0 = control.encode(x, "image").l0().float().mean()
    assert 4 < l0 < 9
    assert not control.training and not torch.equal(control.encoder.weight, sae.encoder.weight)
    again = random_control(sae)
    assert torch.equal(again.encode(x, "image").to_dense(), control.encode(x, "image").to_dense())


@pytest.mark.parametrize("name", ["jumprelu", "relu"])
def test_a_control_without_a_budget_fires_as_often_as_the_trained_sae_latent_by_latent(name):
    """Trained thresholds differ from latent to latent and from modality to modality; some latents never fire."""
    torch.manual_seed(2)
    selector = JumpReLU(per_modality=True) if name == "jumprelu" else ReLU()
    sae = SAE(16, 64, modalities=["image", "text"], selector=selector, normaliser=Normaliser(centre=True, scale="rms"))
    x = {m: 3 * torch.randn(5000, 16) + 1 for m in sae.modalities}
    sae.fit_normaliser(x)
    with torch.no_grad():
        if name == "jumprelu":
            sae.selector.thresholds.copy_((torch.rand(2, 64) * 3).log())
            sae.selector.thresholds[0, :5] = 100.0
        else:
            sae.encoder.bias.copy_(-3 * torch.rand(64))
    sae.eval()
    half = {m: rows[::2] for m, rows in x.items()}
    control = random_control(sae, 1, half)
    fired = {m: [(s.encode(v, m).to_dense() != 0).sum(0) for s in (sae, control)] for m, v in half.items()}
    assert all(torch.equal(trained, random) for trained, random in fired.values())
    if name == "jumprelu":
        assert not fired["image"][1][:5].any() and fired["text"][1][:5].any()
    others = [s.encode(x["image"][1::2], "image").l0().float().mean() for s in (sae, control, random_control(sae, 1))]
    assert others[1] == pytest.approx(others[0].item(), rel=0.05)
    assert others[2] > 3 * others[0]  # what a control without rows does, and why it is none
    assert not torch.equal(control.encoder.weight, sae.encoder.weight)


def test_rows_do_nothing_to_controls_with_a_budget_and_none_are_refused():
    torch.manual_seed(3)
    sae = SAE(16, 64, modalities=["image"], selector=TopK(4)).eval()
    x = torch.randn(100, 16)
    with_rows, without = (random_control(sae, 1, rows).encode(x, "image") for rows in ({"image": x}, None))
    assert torch.equal(with_rows.to_dense(), without.to_dense())
    read = to_jumprelu(sae, {"image": x})
    assert needs_rows(read) and not needs_rows(sae)
    with pytest.raises(InputError, match="no image rows to learn from how often"):
        random_control(read, 1, {"image": x[:0]})


def test_a_latent_that_fires_on_more_rows_than_a_random_one_can_has_a_threshold_of_0():
    torch.manual_seed(4)
    sae = SAE(8, 16, modalities=["image"], selector=ReLU()).eval()
    with torch.no_grad():
        sae.encoder.bias.fill_(100.0)
    control = random_control(sae, 0, {"image": (x := torch.randn(200, 8))})
    assert (control.selector.threshold("image") == 0).all()
    assert 0.3 < (control.encode(x, "image").to_dense() != 0).float().mean() < 0.7
