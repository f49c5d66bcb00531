"""Probes under shift: the robustness line, matching, intervals, and all features and controls scored alike."""

import math

import pytest
import torch

from mmsae.evaluation.features import encode_features
from mmsae.evaluation.generalisation import at_source, effective_robustness, generalisation, logit, robustness_line
from mmsae.evaluation.rows import find
from mmsae.evaluation.spaces import spaces
from mmsae.metrics.statistics import bootstrap_mean, bootstrap_ratio, paired_interval
from mmsae.sae import SAE, TopK
from mmsae.types import InputError


def sigmoid(v):
    return 1 / (1 + math.exp(-v))


def test_points_on_a_line_have_no_effective_robustness():
    points = [(sigmoid(v), sigmoid(0.5 * v - 1)) for v in (-1.0, 0.0, 1.0, 2.0)]
    line = robustness_line(points, (10**6, 10**6))
    assert line == pytest.approx((0.5, -1.0), abs=1e-6)
    for s, t in points:
        assert effective_robustness(s, t, line, 10**6) == pytest.approx(0, abs=1e-9)
        assert effective_robustness(s, t + 0.1, line, 10**6) == pytest.approx(0.1, abs=1e-9)
    assert robustness_line([(0.9, 0.7), (0.9, 0.5)], (100, 100))[0] == 0  # no slope from one source accuracy


def test_perfect_shares_have_finite_log_odds():
    assert logit(1.0, 100) == pytest.approx(math.log(99.5 / 0.5)) == -logit(0.0, 100)


def test_target_at_a_source_accuracy():
    points = [(0.5, 0.3), (0.9, 0.7), (0.9, 0.5)]
    assert at_source(points, 0.7) == pytest.approx(0.45) and at_source(points, 0.9) == pytest.approx(0.6)
    assert math.isnan(at_source(points, 0.95))


def test_intervals_cover_and_pair():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2000, generator=g)
    low, high = bootstrap_mean(x)
    half = 1.96 / 2000**0.5
    assert low == pytest.approx(x.mean().item() - half, abs=0.01) and high == pytest.approx(
        x.mean().item() + half, abs=0.01
    )
    low, high = bootstrap_ratio(3 * x.square(), x.square())
    assert low == pytest.approx(3) == high
    assert all(math.isnan(v) for v in bootstrap_mean(torch.tensor([1.0, math.nan])))
    a = torch.rand(500, generator=g) < 0.8
    assert paired_interval(a, a) == (0, 0)
    low, high = paired_interval(a, a & (torch.rand(500, generator=g) < 0.9))
    assert 0.03 < low < 0.08 < high < 0.13


@pytest.fixture(scope="module")
def world():
    """Classes are single directions; the SAE's atoms are these directions and some that only noise has."""
    g = torch.Generator().manual_seed(0)
    d, classes = 24, 4
    basis = torch.linalg.qr(torch.randn(d, d, generator=g))[0]
    sae = SAE({"image": d}, d, modalities=("image",), selector=TopK(2)).requires_grad_(False)
    atoms = sae.dictionary("image").weight
    atoms.copy_(basis)
    sae.encoder.weight.copy_(basis)

    def draw(n, shift):
        y = torch.arange(n) % classes
        x = 3 * basis[y] + 0.6 * torch.randn(n, d, generator=g)
        # the shift adds a weak constant that points at class 0 for linear probes, too weak to be among the top 2
        return encode_features(sae, x + shift * basis[0], y, [str(c) for c in range(classes)])

    return sae, [draw(400, 0), draw(200, 0), draw(300, 0)], {"pushed": draw(300, 1.5), "same": draw(300, 0)}


def test_all_features_and_controls_are_scored_alike(world):
    sae, (train, val, test), targets = world
    got = generalisation(sae, train, val, test, targets, sparse=(1, 5), grid=(1e-2, 1.0, 1e2))
    rows = got["rows"]
    kinds = {(r["features"], r["control"]) for r in rows}
    assert kinds == {("raw", ""), ("code", ""), ("recon", ""), ("resid", ""), ("code", "random"), ("raw", "pca"),
                     ("raw", "whitened")}  # fmt: skip
    for probe in ("linear", "nearest mean", "1-sparse", "5-sparse"):
        for features in ("raw", "code"):
            (source,) = find(rows, set="source", score=f"{probe} accuracy", features=features, control="")
            assert source["n"] == 300 and source["low"] <= source["value"] <= source["high"]
    (raw,) = find(rows, set="same", score="linear accuracy", features="raw", control="")
    (code,) = find(rows, set="same", score="linear accuracy", features="code", control="")
    (gain,) = find(rows, set="same", score="linear gain", features="code", control="")
    assert raw["value"] > 0.9 and gain["value"] == pytest.approx(code["value"] - raw["value"])
    assert gain["low"] <= gain["value"] <= gain["high"]
    assert not find(rows, set="same", score="linear gain", features="raw", control="")
    (matched,) = find(rows, set="pushed", score="matched gain", features="code", control="")
    assert abs(matched["value"]) < 0.5 and matched["source"] > 0.8
    assert {"pushed", "same"} == set(got["lines"])


def test_no_classes_no_probes(world):
    sae, (train, val, test), targets = world
    one = train._replace(labels=torch.zeros(train.n, dtype=torch.long))
    with pytest.raises(InputError, match="two classes"):
        generalisation(sae, one, val, test, targets)
    gone = test._replace(labels=torch.full((test.n,), -1))
    with pytest.raises(InputError, match="none of the source images"):
        generalisation(sae, train, val, gone, targets)
    other = targets["same"]._replace(labels=torch.full((300,), 9))
    with pytest.raises(InputError, match="target far shares no class"):
        generalisation(sae, train, val, test, {"far": other})


def test_unknown_features_and_controls(world):
    sae, (train, *_), _ = world
    with pytest.raises(InputError, match="'odd'"):
        spaces([train], sae, kinds=("odd",))
    with pytest.raises(InputError, match="'odd'"):
        spaces([train], sae, controls=("odd",))
    tokens = train._replace(pool="max")
    assert {s.control for s in spaces([tokens], sae)} == {"", "pca", "whitened"}  # random needs the tokens
