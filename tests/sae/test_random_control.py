"""Untrained SAEs whose selector codes by thresholds have those of a first batch."""

import pytest
import torch

from mmsae import SAE
from mmsae.sae import BatchTopK, FeatureChoice, Normaliser, random_control


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
