"""Phrases of captions and their log-odds, beside numbers worked out by hand."""

import math

import numpy as np
import pytest

from mmsae.metrics.concepts.ngrams import log_odds, phrases_of


def test_phrases_have_no_function_word_at_their_ends():
    assert list(phrases_of("A plate of Food")) == ["plate", "plate of food", "food"]
    assert list(phrases_of("red circle", longest=1)) == ["red", "circle"]
    assert list(phrases_of("of the")) == [] and list(phrases_of("")) == []
    assert list(phrases_of("một con mèo")) == ["một", "một con", "một con mèo", "con", "con mèo", "mèo"]


def test_log_odds_equal_the_formula_by_hand():
    # a phrase in 30 of 40 captions against 10 of 160; share 40 / 200; the prior counts as 10 captions
    got = log_odds(np.array([[30.0]]), np.array([40.0]), np.array([[10.0]]), np.array([160.0]), np.array([0.2]), 10.0)
    delta = math.log(32 / 18) - math.log(12 / 158)
    assert got[0, 0] == pytest.approx(delta / math.sqrt(1 / 32 + 1 / 12), abs=1e-12)


def test_log_odds_change_sign_with_the_groups_and_are_near_0_for_equal_shares():
    rng = np.random.default_rng(0)
    y, z, share = rng.integers(1, 50, (3, 5)) * 1.0, rng.integers(1, 50, (3, 5)) * 1.0, rng.uniform(0.1, 0.9, 5)
    n, m = np.full(3, 60.0), np.full(3, 70.0)
    assert np.allclose(log_odds(y, n, z, m, share), -log_odds(z, m, y, n, share))
    same = log_odds(np.array([[30.0]]), np.array([100.0]), np.array([[60.0]]), np.array([200.0]), np.array([0.3]))
    assert abs(same[0, 0]) < 1e-9
    rare = log_odds(np.array([[1.0, 20.0]]), np.array([20.0]), np.array([[0.0, 0.0]]), np.array([200.0]),
                    np.array([1 / 220, 20 / 220]))  # fmt: skip
    assert rare[0, 0] < rare[0, 1]  # one caption is no evidence, although its odds are as infinite
