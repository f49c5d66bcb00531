"""Quality of rankings: numbers by hand, sklearn's, ties, and intervals that cover."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, ndcg_score

from mmsae.metrics.precision_recall import draws_interval, ranking_draws, ranking_quality
from mmsae.types import InputError


def test_by_hand():
    found = ranking_quality(np.array([0.9, 0.8, 0.7, 0.6]), np.array([1, 0, 1, 0]), k=2)
    assert found == pytest.approx(((1 + 2 / 3) / 2, 0.5, 1 / (1 + 1 / np.log2(3))))
    assert ranking_quality(np.array([3, 2, 1.0]), np.array([1, 1, 0]), k=2) == (1, 1, 1)


def test_ties_count_as_their_average():
    scores, wanted = np.array([1, 0, 0, 0, 0.0]), np.array([0, 1, 0, 0, 1])
    found = ranking_quality(scores, wanted, k=3)
    assert found.average_precision == pytest.approx(2 / 5)  # one step, at which 2 of 5 are wanted
    assert found.precision == pytest.approx((0 + 0.5 + 0.5) / 3)
    again = np.array([4, 0, 1, 2, 3])
    assert ranking_quality(scores[again], wanted[again], k=3) == found


def test_sklearn_says_the_same():
    rng = np.random.default_rng(0)
    for digits in (1, 6):  # with ties, without
        scores, wanted = rng.random(200).round(digits), rng.random(200) < 0.2
        found = ranking_quality(scores, wanted, k=25)
        assert found.average_precision == pytest.approx(average_precision_score(wanted, scores))
        assert found.ndcg == pytest.approx(ndcg_score(wanted[None], scores[None], k=25))


def test_draws():
    rng = np.random.default_rng(0)
    wanted = rng.random(400) < 0.3
    scores = wanted + rng.normal(size=400)
    draws = ranking_draws(scores, wanted)
    low, high = draws_interval(draws[:, 0])
    assert low < ranking_quality(scores, wanted).average_precision < high and 0.05 < high - low < 0.3
    assert np.array_equal(draws, ranking_draws(scores, wanted))
    assert np.array_equal(draws, ranking_draws(scores * 2, wanted))  # the same items whatever the scores


def test_bad_input():
    with pytest.raises(InputError, match="none is wanted"):
        ranking_quality(np.array([1.0]), np.array([False]))
    with pytest.raises(InputError, match="2 scores were given with the truth of 1"):
        ranking_quality(np.array([1.0, 2]), np.array([True]))
    with pytest.raises(InputError, match="1 of 2 scores are NaN"):
        ranking_quality(np.array([1.0, np.nan]), np.array([True, False]))
