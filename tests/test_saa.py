"""The sampler of benchmarks/saa.py: its cut, its memory, its draws."""

import numpy as np
import pytest
import torch

from benchmarks.saa import ARMS, MOMENTUM, Draws, LossHistory, naive, otsu
from mmsae.types import SAEOutput


def slow_otsu(x):
    best = (-1.0, -np.inf)
    for cut in np.unique(x)[1:]:
        low, high = x[x < cut], x[x >= cut]
        between = len(low) * len(high) / len(x) ** 2 * (high.mean() - low.mean()) ** 2
        best = max(best, (between / x.var(), cut))
    return best


def test_the_cut_is_that_of_trying_all():
    rng = np.random.default_rng(0)
    for n in range(2, 202):
        x = np.round(rng.normal(size=n) * rng.choice([1, 5], n), 2)
        cut, share = otsu(x)
        slow_share, slow_cut = slow_otsu(x)
        assert share == pytest.approx(slow_share)
        assert ((x < cut) == (x < slow_cut)).all()
    cut, share = otsu(np.r_[rng.normal(0, 0.1, 500), rng.normal(5, 0.1, 100)])
    assert 1 < cut < 4 and share > 0.9
    assert otsu(np.full(50, 3.0)) == (-np.inf, 0.0)


def outputs(share):
    """Rows of norm 1 of which such shares are unexplained."""
    share = torch.tensor(share)
    target = torch.zeros(len(share), 2)
    target[:, 0] = 1
    recon = torch.stack([1 - share.sqrt(), torch.zeros(len(share))], 1)
    return {"image": SAEOutput(recon, None, target, recon)}


def test_the_history_is_an_exponential_average_from_the_first_visit():
    history = LossHistory(3)
    seen = [0.5, 0.1, 0.9, 0.3]
    for value in seen:
        history.rows = np.array([1])
        assert history(outputs([value]), None) == 0
    expected = seen[0] * MOMENTUM**3 + sum((1 - MOMENTUM) * MOMENTUM ** (3 - i) * seen[i] for i in (1, 2, 3))
    assert history.value[1] == pytest.approx(expected, rel=1e-5)
    assert history.visits.tolist() == [0, 4, 0] and np.isnan(history.value[[0, 2]]).all()


def test_what_is_known_well_is_drawn_less_often_and_only_then():
    n = 1000
    history = LossHistory(n)
    easy = np.arange(n) < 800
    history.value, history.visits = np.where(easy, 0.01, 0.5) * np.exp(0.1 * np.sin(np.arange(n))), np.full(n, 2)
    some, share = naive(history, "otsu", np.random.default_rng(0))
    assert (some == easy).all() and share > 0.9
    shuffled, _ = naive(history, "shuffled", np.random.default_rng(0))
    assert shuffled.sum() == 800 and (shuffled != easy).any()
    for arm, chance in (("uniform", 1.0), ("sampled .3", 0.3)):
        draws = Draws({"image": torch.zeros(n, 2)}, history, arm, 500, 0)
        counts = np.zeros(n)
        for _ in range(400):
            next(draws)
            counts += np.bincount(history.rows, minlength=n)
        assert draws.p.sum() == pytest.approx(1) and ARMS[arm][0] == chance
        assert counts[easy].mean() / counts[~easy].mean() == pytest.approx(chance, rel=0.05)
    history.value = np.full(n, 0.3)
    assert not naive(history, "otsu", np.random.default_rng(0))[0].any()  # nothing to cut
