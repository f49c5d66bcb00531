"""Measures of steering against hand numbers."""

import numpy as np
import pytest
import torch

from mmsae.metrics.statistics import interval
from mmsae.steering.measure.images import (
    directional,
    dose_response,
    kid,
    locality,
    specificity,
    unlearning,
)
from mmsae.types import InputError


def test_directional_similarity_is_one_along_the_words_and_zero_without_a_move():
    before = torch.tensor([[1.0, 0, 0], [1, 0, 0], [1, 0, 0]])
    after = torch.tensor([[1.0, 2, 0], [1, 0, 0], [1, -1, 1]])
    got = directional(before, after, torch.tensor([0.0, 0, 1]), torch.tensor([0.0, 3, 1]))
    assert got.tolist() == pytest.approx([1, 0, -(0.5**0.5)])


def test_locality_counts_pixels_inside_and_outside():
    before = torch.zeros(2, 3, 4, 4)
    after = before.clone()
    after[0, :, :2, :2] = 1.0  # picture 0: the whole mask and nothing else
    after[1, :, 0, 0], after[1, :, 3, 3] = 2.0, 1.0  # picture 1: 4 / 4 pixels inside, 1 / 12 outside
    mask = torch.tensor([[1, 0], [0, 0]])
    got = locality(before, after, mask)
    assert got.inside.tolist() == pytest.approx([1, 1]) and got.outside.tolist() == pytest.approx([0, 1 / 12])
    assert got.share.tolist() == pytest.approx([1, 12 / 13])
    assert locality(before, before, mask).share.isnan().all()
    with pytest.raises(InputError, match="no inside and outside"):
        locality(before, after, torch.ones(2, 2))


def test_dose_response_ranks_means_and_images():
    got = dose_response([0, 0, 1, 1, 2, 2], [0, 4, 1, 5, 2, 6])
    assert got.rho == pytest.approx(1) and got.means == {0.0: 2, 1.0: 3, 2.0: 4}
    assert 0 < got.rho_images < 1


def test_specificity_by_hand():
    got = specificity([1.0, 3.0], [[0, 0], [2, 2], [1, 1]])  # means 0, 2, 1: deviation 1, mean 1
    assert (got.effect, got.control, got.size, got.controls) == pytest.approx((2, 1, 1, 3))
    assert got.win_rate == pytest.approx((1 + 0 + 0.5 + 1 + 1 + 1) / 6)
    assert got.beaten == pytest.approx((1 + 0.5 + 1) / 3)
    assert specificity([1.0], [[0.0], [0.0]]).size == float("inf")
    assert specificity([0.0], [[0.0], [0.0]]).size == 0
    with pytest.raises(InputError, match="R >= 2"):
        specificity([1.0], [[0.0]])


def test_kid_by_hand_and_on_equal_distributions():
    x, y = torch.tensor([[1.0], [0.0]]), torch.tensor([[2.0], [0.0]])
    # k: (1*0+1)^3 = 1 off the diagonal of both; across (2+1)^3 = 27, 1, 1, 1
    assert kid(x, y) == pytest.approx(1 + 1 - 2 * 30 / 4)
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(400, 8, generator=g), torch.randn(400, 8, generator=g)
    assert abs(kid(a, b)) < 0.02 < kid(a, b + 1)


def test_unlearning_by_hand():
    right = torch.tensor([False, False, False, True, True, True, False, True])
    concept = ["red"] * 4 + ["blue"] * 4
    got = unlearning(right, concept, "red", {"background": torch.tensor([1, 1, 1, 1, 1, 1, 0, 0]).bool()})
    assert got == pytest.approx((0.75, 0.75, 0.75, 0.75))
    assert np.isnan(unlearning(right, concept, "red").cra)
    with pytest.raises(InputError, match="0 of 8"):
        unlearning(right, concept, "green")


def test_the_bootstrap_resamples_prompts():
    values, prompts = [0.0] * 50 + [1.0] * 50, ["a"] * 50 + ["b"] * 50
    got = interval(values, prompts)
    assert (got.mean, got.low, got.high, got.n, got.prompts) == (0.5, 0, 1, 100, 2)  # over images it would be .4 to .6
    over_images = interval(values, range(100))
    assert 0.38 < over_images.low < 0.45 and 0.55 < over_images.high < 0.62
    assert interval(values, prompts) == got, "the same seed draws the same"
    one = interval([1.0, np.nan, 3.0], ["a", "b", "a"])
    assert one.mean == 2 and one.n == 2 and np.isnan(one.low)
    with pytest.raises(InputError, match="3 values were given with 2"):
        interval([1, 2, 3], ["a", "b"])
