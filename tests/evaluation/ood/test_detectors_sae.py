"""Detectors on codes: oracles of spec/probing.md section 13, naive formulas, and codes without any latent on."""

import math

import pytest
import torch

from mmsae.evaluation.ood import detectors_sae as ds
from mmsae.types import Codes


def codes(n=60, d=40, k=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    i = torch.rand(n, d, generator=g).argsort(1)[:, :k]
    v = torch.rand(n, k, generator=g) * (torch.rand(n, k, generator=g) > 0.2)
    return Codes(v, i, d)


def dense(z):
    return Codes(z.to_dense(), None, z.d_sae)


def test_rarity_oracle():
    q = torch.tensor([0.5, 0.25, 0.01])
    z = Codes(torch.tensor([[2.0], [0.3]]), torch.tensor([[0], [2]]), 3)
    for form in (z, dense(z)):
        got = ds.rarity(form, q)
        torch.testing.assert_close(got, torch.tensor([-0.990880, -5.585999]).double(), atol=1e-6, rtol=0)


def test_firing_rates_are_smoothed():
    z = Codes(torch.tensor([[1.0], [0.0], [2.0]]), torch.tensor([[0], [1], [0]]), 3)
    assert ds.firing_rates(z).tolist() == pytest.approx([3 / 5, 1 / 5, 1 / 5])


def test_scores_equal_naive_formulas():
    z, y, x = codes(), torch.arange(60) % 3, codes(seed=1)
    p = ds.Profiles.fit(z, y, 3)
    rows, seen = z.to_dense().double(), x.to_dense().double()
    predicted = torch.arange(60) % 2  # class 2 is never predicted
    for i in range(60):
        own = rows[y == predicted[i]]
        mean, count = own.mean(0), (own > 0).sum(0)
        torch.testing.assert_close(p.mean[predicted[i]], mean, atol=1e-7, rtol=1e-5)
        assert torch.equal(p.count[predicted[i]].round().long(), count)
        on = seen[i] > 0
        want = -(count[on] == 0).double().mean() if on.any() else -1.0
        assert p.support(x, predicted)[i].item() == pytest.approx(float(want))
        top = mean.topk(8).indices
        rank = lambda v: torch.stack([(v < a).sum() + ((v == a).sum() + 1) / 2 for a in v])  # noqa: E731
        a, b = rank(seen[i][top]), rank(mean[top])
        want = torch.corrcoef(torch.stack([a, b]))[0, 1].nan_to_num(0).item()
        assert p.cap_spearman(x, predicted, 8)[i].item() == pytest.approx(want, abs=1e-6)


def test_cap_energy_by_hand():
    """Profile (.6, .3, .1): the core is the first two, .9 of the mass; the third counts as the rest."""
    p = ds.Profiles(torch.tensor([[6.0, 3, 1]]).double(), torch.ones(1, 3).double())
    z = Codes(torch.tensor([[6.0, 3, 1], [0, 0, 5], [1, 1, 0], [0, 0, 0]]), None, 3)
    kl = p.cap_energy(z, torch.zeros(4, dtype=torch.long))
    half = 0.5 * math.log(0.5 / 0.6) + 0.5 * math.log(0.5 / 0.3)
    assert kl.tolist() == pytest.approx([0, math.log(0.1), -half, math.log(0.1)], abs=1e-6)


def test_signed_codes_count_by_size():
    z = codes()
    labels = torch.arange(60) % 3
    mirrored = z._replace(values=-z.values)  # the same, with every latent turned round
    both = [ds.Profiles.fit(c, labels, 3) for c in (z, mirrored)]
    for name in ("support", "cap_spearman", "cap_energy"):
        a, b = (getattr(p, name)(c, labels) for p, c in zip(both, (z, mirrored), strict=True))
        torch.testing.assert_close(a, b)


def test_empty_codes_have_finite_low_confidences():
    z, y = codes(), torch.arange(60) % 3
    p, q = ds.Profiles.fit(z, y, 3), ds.firing_rates(z)
    empty = Codes(torch.zeros(4, 5), z.indices[:4], 40)
    c = torch.zeros(4, dtype=torch.long)
    scores = (ds.rarity(empty, q), p.support(empty, c), p.cap_spearman(empty, c), p.cap_energy(empty, c))
    assert all(s.isfinite().all() for s in scores)
    assert (p.support(empty, c) == -1).all()
    assert (p.cap_energy(empty, c) < p.cap_energy(z, y).median()).all()
    blank = ds.Profiles.fit(Codes(torch.zeros(6, 5), z.indices[:6], 40), y[:6], 3)  # training was empty, too
    assert blank.cap_energy(z, y).isfinite().all() and blank.cap_spearman(z, y).eq(0).all()


def test_sparse_and_dense_codes_agree():
    z, y, x = codes(), torch.arange(60) % 3, codes(seed=1)
    a, b = ds.Profiles.fit(z, y, 3), ds.Profiles.fit(dense(z), y, 3)
    for name in ("support", "cap_spearman", "cap_energy"):
        torch.testing.assert_close(getattr(a, name)(x, y), getattr(b, name)(dense(x), y), atol=1e-6, rtol=1e-5)
