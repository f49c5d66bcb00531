"""Differences of shares, tests of them and association, beside numbers worked out by hand and scipy's."""

import numpy as np
import pytest
from scipy import stats

from mmsae.metrics.shares import benjamini_hochberg, fisher_exact, mcnemar, npmi, paired_proportions, two_proportions
from mmsae.types import InputError


def test_benjamini_hochberg_by_hand():
    # p sorted: .01 .02 .03 .5 of four tests: .04 .04 .04 .5 after the running minimum from the end
    assert benjamini_hochberg(np.array([0.03, 0.5, 0.01, 0.02])) == pytest.approx([0.04, 0.5, 0.04, 0.04])
    assert benjamini_hochberg(np.array([0.04, np.nan, 0.9])) == pytest.approx([0.08, np.nan, 0.9], nan_ok=True)
    assert benjamini_hochberg(np.array([])).shape == (0,)
    p = np.random.default_rng(0).random(200) ** 3
    assert benjamini_hochberg(p) == pytest.approx(stats.false_discovery_control(p))


def test_fisher_is_scipys():
    # the lady tasting tea: 3 of 4 against 1 of 4 is 34/70
    assert fisher_exact(np.array([3.0]), 4, np.array([1.0]), 4) == pytest.approx([34 / 70])
    rng = np.random.default_rng(0)
    for n_a, n_b in ((7, 90), (40, 40), (300, 12)):
        a, b = rng.integers(0, n_a + 1, 60), rng.integers(0, n_b + 1, 60)
        right = [stats.fisher_exact([[i, n_a - i], [j, n_b - j]]).pvalue for i, j in zip(a, b, strict=True)]
        assert fisher_exact(a, n_a, b, n_b) == pytest.approx(right, rel=1e-6)


def test_fisher_in_parts(monkeypatch):
    from mmsae.metrics import shares

    a, b = np.arange(30), np.arange(30)[::-1]
    whole = fisher_exact(a, 40, b, 50)
    monkeypatch.setattr(shares, "CELLS", 100)
    assert np.array_equal(fisher_exact(a, 40, b, 50), whole)


def test_two_proportions_by_hand():
    found = two_proportions(np.array([56, 0, 3]), 70, np.array([48, 0, 0]), 80)
    # Newcombe 1998, table II, example (a): 56/70 - 48/80, method 10 gives .0524 to .3339
    assert (found.low[0], found.high[0]) == pytest.approx((0.0524, 0.3339), abs=5e-5)
    pooled = 104 / 150
    z = 0.2 / np.sqrt(pooled * (1 - pooled) * (1 / 70 + 1 / 80))
    assert found.z[0] == pytest.approx(z) and found.p[0] == pytest.approx(2 * stats.norm.sf(z))
    assert found.difference[0] == pytest.approx(0.2) and found.relative[0] == pytest.approx(0.25)
    assert (found.z[1], found.p[1], found.relative[1]) == (0, 1, 0)
    assert found.exact.tolist() == [False, True, True]
    assert found.p[2] == pytest.approx(stats.fisher_exact([[3, 67], [0, 80]]).pvalue)
    with pytest.raises(InputError, match="between 70 items and 0"):
        two_proportions(np.array([1]), 70, np.array([0]), 0)


@pytest.mark.parametrize("kind", ["independent", "paired"])
def test_change_of_places_changes_the_sign_alone(kind):
    rng = np.random.default_rng(0)
    x, y, both = rng.integers(0, 30, (3, 50))
    if kind == "independent":
        one, other = two_proportions(x, 100, y, 60), two_proportions(y, 60, x, 100)
    else:
        one, other = paired_proportions(x, y, both, 100), paired_proportions(y, x, both, 100)
    for field in ("difference", "relative", "z"):
        assert getattr(one, field) == pytest.approx(-getattr(other, field))
    assert one.low == pytest.approx(-other.high) and one.p == pytest.approx(other.p, rel=1e-9)
    assert (one.low <= one.difference).all() and (one.difference <= one.high).all()


def test_mcnemar_by_hand():
    # 1 against 5: 2 (1 + 6) / 64
    assert mcnemar(np.array([1, 5, 0, 3]), np.array([5, 1, 0, 3])) == pytest.approx([14 / 64, 14 / 64, 1, 1])
    found = paired_proportions(np.array([5]), np.array([1]), np.array([4]), 20)
    assert (found.a[0], found.b[0], found.z[0]) == pytest.approx((0.45, 0.25, 4 / np.sqrt(6)))
    # cells 5.5 and 1.5 of 22: 4/22 +- 1.96 sqrt(7/22 - (4/22)^2) / sqrt(22)
    half = 1.959964 * np.sqrt(7 / 22 - (4 / 22) ** 2) / np.sqrt(22)
    assert (found.low[0], found.high[0]) == pytest.approx((4 / 22 - half, 4 / 22 + half))
    with pytest.raises(InputError, match="of 0 items"):
        paired_proportions(np.array([0]), np.array([0]), np.array([0]), 0)


def test_intervals_cover():
    rng = np.random.default_rng(1)
    a, b = rng.binomial(60, 0.3, 4000), rng.binomial(90, 0.1, 4000)
    found = two_proportions(a, 60, b, 90)
    assert 0.93 < ((found.low <= 0.2) & (found.high >= 0.2)).mean() < 0.975


def test_npmi_by_hand():
    both, x, y = np.array([10, 25, 0, 100, 20]), np.array([10, 50, 30, 100, 40]), np.array([10, 50, 20, 100, 20])
    right = [1, 0, -1, 1, np.log(0.2 / (0.4 * 0.2)) / -np.log(0.2)]
    assert npmi(both, x, y, 100) == pytest.approx(right)
