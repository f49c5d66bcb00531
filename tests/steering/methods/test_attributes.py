"""Attribute discovery on planted words."""

import pytest
import torch

from mmsae.steering.methods.attributes import SteeredPairs, clip_choice, confirm, discover, gains, score_words
from mmsae.types import InputError

WORDS = ["red", "green", "blue", "round", "small", "dark"]


class ToyJudge:
    """Pictures (n, 3, 2, 2) are their 12 numbers; word i is axis i."""

    def images(self, x):
        return x.flatten(1)

    def texts(self, texts):
        return torch.eye(12)[[WORDS.index(t) for t in texts]]


def pairs(direction, n=20, noise=0.1, seed=0):
    g = torch.Generator().manual_seed(seed)
    before = torch.rand(n, 3, 2, 2, generator=g)
    move = direction + noise * torch.randn(n, 12, generator=g)
    return SteeredPairs(before, before + move.view(-1, 3, 2, 2), [f"p{i // 2}" for i in range(n)])


def random_pairs(r=20):
    g = torch.Generator().manual_seed(9)
    return [pairs(torch.nn.functional.normalize(torch.randn(12, generator=g), dim=0) * 0.2, seed=i) for i in range(r)]


def test_the_planted_word_is_found_and_confirmed_on_other_prompts():
    blue = torch.eye(12)[2] * 2
    found = discover(ToyJudge(), pairs(blue), random_pairs(), WORDS)
    assert [a.word for a in found] == ["blue"] and found[0].gain == pytest.approx(2, abs=0.1)
    assert min(found[0].z_words, found[0].z_random) > 3
    [a] = confirm(found, pairs(blue, seed=5), clip_choice(ToyJudge()))
    assert a.choice.mean == 1 and a.confirmed
    [wrong] = confirm(found, pairs(-blue, seed=5), clip_choice(ToyJudge()))
    assert wrong.choice.mean == 0 and not wrong.confirmed


def test_a_random_feature_has_no_attribute_and_a_common_shift_is_none():
    assert discover(ToyJudge(), random_pairs()[0], random_pairs()[1:], WORDS) == []
    everything = pairs(torch.ones(12))  # all words gain: none stands out
    assert discover(ToyJudge(), everything, random_pairs(), WORDS) == []


def test_scores_by_hand():
    random = torch.tensor(
        [[3.0, 0, -3], [1, 1, -2], [2, -1, -1]]
    )  # about the mean of a row, mean 2, 0, -2 and deviation 1
    z_words, z_random = score_words(torch.tensor([4.0, 1.0, 3.0]), random)
    # gains from their mean are 4/3, -5/3, 1/3
    assert z_random.tolist() == pytest.approx([4 / 3 - 2, -5 / 3, 1 / 3 + 2])
    # word 2: the others are at -2/3 and -5/3
    assert z_words[2] == pytest.approx((7 / 3 + 7 / 6) / 0.5**0.5)
    assert z_words[1] == pytest.approx((-5 / 3 - 5 / 6) / 4.5**0.5)
    with pytest.raises(InputError, match="3 words and 2 random"):
        score_words(torch.ones(2), torch.ones(5, 2))


def test_a_word_that_anything_gains_does_not_hide_the_one_that_only_this_feature_does():
    """Whatever is pushed here breaks images towards "dark"; one feature makes them a little redder besides."""
    dark, red = 3 * torch.eye(12)[5], torch.eye(12)[0]
    random = [pairs(dark * share, seed=i) for i, share in enumerate(torch.linspace(0.5, 1.5, 20))]
    found = discover(ToyJudge(), pairs(dark + red, seed=50), random, WORDS)
    assert [a.word for a in found] == ["red"] and found[0].gain < 1.5
    assert discover(ToyJudge(), pairs(dark, seed=51), random, WORDS) == []


def test_gains_are_means_of_cosine_changes():
    p = pairs(torch.eye(12)[0], noise=0.0)
    assert gains(ToyJudge(), p, ["red", "green"]).tolist() == pytest.approx([1, 0])


def test_the_order_of_the_two_pictures_is_hidden_from_the_chooser():
    """A judge that always takes the second picture learns nothing."""
    a = discover(ToyJudge(), pairs(torch.eye(12)[2] * 2), random_pairs(), WORDS)
    [got] = confirm(a, pairs(torch.eye(12)[2], n=400), lambda x, y, w: torch.ones(len(x)))
    assert 0.4 < got.choice.mean < 0.6
