"""AUROC in batches and intervals, beside the slow formulas."""

import numpy as np
import pytest
import torch

from mmsae.interpret.scores import outcomes as module
from mmsae.interpret.scores.outcomes import accuracy_scores, auroc_interval, auroc_rows, auroc_scores, wilson_rows
from mmsae.metrics.statistics import auroc, wilson


@pytest.mark.parametrize("pairs", [2**25, 30])
def test_auroc_equals_that_of_single_rows(monkeypatch, pairs):
    monkeypatch.setattr(module, "PAIRS", pairs)
    rng = np.random.default_rng(0)
    p, n = rng.integers(0, 5, (9, 6)).astype(float), rng.integers(0, 5, (9, 7)).astype(float)
    p[2, 3:], n[3] = np.nan, np.nan
    got = auroc_rows(p, n)
    for i in range(9):
        a, b = (torch.tensor(x[i][~np.isnan(x[i])]) for x in (p, n))
        if len(a) and len(b):
            assert got[i] == pytest.approx(auroc(a, b))
        else:
            assert np.isnan(got[i])


def test_weights_count_positives_as_often():
    rng = np.random.default_rng(0)
    p, n, often = rng.integers(0, 5, (3, 6)).astype(float), rng.integers(0, 5, (3, 7)).astype(float), np.arange(6)
    p[1, 4] = np.nan
    got = auroc_rows(p, n, np.tile(often, (3, 1)).astype(float))
    assert np.allclose(got, auroc_rows(np.repeat(p, often, 1), n))
    assert np.isnan(auroc_rows(p, n, np.zeros((3, 6)))).all()


def test_intervals_hold_the_value_shrink_with_n_and_cover():
    low, high = auroc_interval(
        np.array([0.8, 0.8, 1.0, 0.0]), np.array([10, 1000, 20, 20]), np.array([10, 1000, 20, 20])
    )
    assert low[0] < low[1] < 0.8 < high[1] < high[0] and high[2] == 1 and low[2] == pytest.approx(0.85)
    assert low[3] == 0 and high[3] == pytest.approx(0.15)
    rng, inside = np.random.default_rng(0), 0
    on, off = rng.normal(1, 1, (400, 30)), rng.normal(0, 1, (400, 40))
    s = auroc_scores(np.arange(400), on, off)
    inside = ((s.low <= 0.7602) & (s.high >= 0.7602)).mean()  # Phi(1 / sqrt 2)
    assert 0.9 < inside <= 1 and (s.n == 70).all() and s.chance == 0.5


def test_shares_are_wilsons():
    low, high = wilson_rows(np.array([3.0, 0, 5]), np.array([10, 4, 5]))
    for i, (hits, n) in enumerate(((3, 10), (0, 4), (5, 5))):
        assert (low[i], high[i]) == pytest.approx(wilson(hits, n))
    s = accuracy_scores(np.arange(2), np.array([4, 0]), np.array([5, 0]), 0.2)
    assert s.value[0] == 0.8 and np.isnan(s.value[1]) and np.isnan(s.low[1])
    assert s.of(np.array([1])).latents.tolist() == [1] and s.of(np.array([1, 0])).value[1] == 0.8
