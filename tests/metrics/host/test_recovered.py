"""Loss recovered of zero-shot: the host recovers 1, zeros and means 0; the logit scale matters."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from mmsae.metrics.host.recovered import zero_shot_recovered


@pytest.fixture
def data():
    g = torch.Generator().manual_seed(0)
    classes, labels = torch.randn(5, 8, generator=g), torch.arange(200) % 5
    return classes[labels] + 0.5 * torch.randn(200, 8, generator=g), classes, labels


def test_identity_zero_and_mean(data):
    x, classes, labels = data
    same = zero_shot_recovered(x, x, classes, labels, 20.0)
    assert same.recovered_zero == same.recovered_mean == same.recovered_kl == same.agreement == 1
    assert same.zero == pytest.approx(math.log(5)) and same.images == 200
    logits = 20 * normalize(x, dim=1) @ normalize(classes, dim=1).T
    assert same.clean == pytest.approx(cross_entropy(logits, labels).item(), abs=1e-5)
    assert zero_shot_recovered(x, 0 * x, classes, labels, 20.0).recovered_zero == pytest.approx(0, abs=1e-12)
    mean = zero_shot_recovered(x, x.mean(0).expand_as(x), classes, labels, 20.0)
    assert mean.recovered_mean == pytest.approx(0, abs=1e-5) and mean.recovered_kl == pytest.approx(0, abs=1e-5)


def test_a_damaged_reconstruction_is_between(data):
    x, classes, labels = data
    noisy = x + torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    got = zero_shot_recovered(x, noisy, classes, labels, 20.0)
    assert 0 < got.recovered_zero < 1 and 0 < got.recovered_kl < 1
    assert got.top1_reconstructed < got.top1_clean and got.agreement < 1


def test_without_the_logit_scale_everything_is_the_logarithm_of_the_classes(data):
    x, classes, labels = data
    flat = zero_shot_recovered(x, x, classes, labels, 0.01)
    assert (
        abs(flat.clean - math.log(5)) < 0.01 < abs(zero_shot_recovered(x, x, classes, labels, 20.0).clean - math.log(5))
    )


def test_a_host_that_is_worse_than_zeros_has_nothing_to_recover(data):
    x, classes, labels = data
    wrong = zero_shot_recovered(x, x, classes, (labels + 1) % 5, 50.0)
    assert wrong.clean > wrong.zero and math.isnan(wrong.recovered_zero)
    assert wrong.agreement == 1
