"""Absorption by planted children, targeted perturbation of disjoint and of shared features, removal of a bias."""

import itertools

import pytest
import torch

from mmsae.metrics.concepts.absorption import (
    Binary,
    ablate,
    absorption,
    effects,
    f1,
    fit_binary,
    main_features,
    tpp,
)
from mmsae.types import Codes

N, D = 300, 8


def family(leak):
    """A parent with three children: atoms 0 (parent) and 1..3, which share the parent's direction.

    ``leak`` is the share of child 1's rows on which the parent is silent and the child's atom carries it.
    """
    atoms = torch.eye(D)
    atoms[1:4, 0] = 1.0  # a child's atom points at the parent, too
    child = torch.arange(N) % 6  # 0, 1, 2: children of the parent; others: not
    z = torch.zeros(N, D)
    z[child < 3, 0] = 1.0
    for c in range(3):
        z[child == c, 5 + c] = 1.0  # what is special of the child, orthogonal to the parent
    rows = (child == 0).nonzero()[:, 0]
    gone = rows[: int(leak * len(rows))]
    z[gone, 0], z[gone, 1], z[gone, 5] = 0.0, 1.0, 0.0
    return z @ atoms, Codes(z, None, D), atoms, child < 3


def test_a_parent_that_always_fires_is_not_absorbed_and_a_silenced_one_is():
    for leak, want in ((0.0, 0.0), (1.0, 1 / 3)):
        x, codes, atoms, truth = family(leak)
        rows = truth.nonzero()[:, 0]
        got = absorption(x[rows], codes.rows(rows), atoms, torch.eye(D)[0], torch.tensor([0]))
        assert got.fraction.mean().item() == pytest.approx(want, abs=1e-6)
        assert got.full.double().mean().item() == pytest.approx(want, abs=1e-6)


def test_absorption_grows_with_planted_leakage():
    means = []
    for leak in (0.0, 0.25, 0.5, 0.75, 1.0):
        x, codes, atoms, truth = family(leak)
        rows = truth.nonzero()[:, 0]
        means.append(absorption(x[rows], codes.rows(rows), atoms, torch.eye(D)[0], torch.tensor([0])).fraction.mean())
    assert all(b > a for a, b in itertools.pairwise(means))


def test_partial_absorption_by_hand():
    atoms = torch.eye(4)
    atoms[1, 0] = 1.0  # cosine with the direction: 1 / sqrt(2)
    codes = Codes(torch.tensor([[0.4, 2**0.5 * 0.6, 0, 0]]), None, 4)
    x = torch.tensor([[1.0, 0.3, 0, 0]])
    got = absorption(x, codes, atoms, torch.eye(4)[0], torch.tensor([0]))
    assert got.fraction.item() == pytest.approx(0.6, abs=1e-6) and not got.full.item()


def test_main_features_stop_where_f1_gains_no_more():
    g = torch.Generator().manual_seed(0)
    truth = torch.rand(400, generator=g) < 0.4
    z = 0.1 * torch.rand(400, 6, generator=g)
    half = torch.rand(400, generator=g) < 0.5
    z[truth & half, 2] = 1.0
    z[truth & ~half, 4] = 1.0
    z[~truth, 5] = 2.0  # the largest difference, but of what is not the concept
    assert sorted(main_features(Codes(z, None, 6), truth).tolist()) == [2, 4]
    assert f1(truth, truth) == 1 and f1(~truth, truth) == 0


def planted(shared):
    """Three concepts, each read by one feature of its own, or all by one shared feature."""
    g = torch.Generator().manual_seed(1)
    truth = torch.rand(N, 3, generator=g) < 0.5
    z = torch.zeros(N, 4)
    z[:, :3] = truth.float()
    if shared:
        truth = truth[:, :1].expand(N, 3)
        z = torch.zeros(N, 4)
        z[:, 3] = truth[:, 0].float()
    atoms = torch.eye(D)[:4]
    return z @ atoms, Codes(z, None, 4), atoms, truth


def test_targeted_perturbation_of_disjoint_and_of_shared_features():
    for shared in (False, True):
        x, codes, atoms, truth = planted(shared)
        probes = [fit_binary(x, truth[:, c]) for c in range(3)]
        chosen = []
        for c, p in enumerate(probes):
            e = effects(codes, truth[:, c], atoms, p.weight)
            order = e.argsort(descending=True)
            chosen.append(order[e[order] > 1e-9])
        got = tpp(x, codes, atoms, truth, probes, chosen, 1)
        chance = torch.stack([truth[:, c].double().mean() for c in range(3)]).mean().item()
        if shared:
            assert got == pytest.approx(0, abs=1e-9)
        else:
            assert got == pytest.approx(chance, abs=0.02)  # without its feature a probe says no to everything
            assert [c[0].item() for c in chosen] == [0, 1, 2]


def test_ablation_keeps_what_the_sae_misses():
    x, codes, atoms, _ = planted(False)
    x = x + 0.3
    y = ablate(x, codes, atoms, torch.tensor([1]))
    torch.testing.assert_close(y[:, [0, 2, 3, 4]], x[:, [0, 2, 3, 4]])
    torch.testing.assert_close(y[:, 1], torch.full((N,), 0.3))


def test_removing_exactly_the_planted_bias_restores_the_clean_probe():
    g = torch.Generator().manual_seed(2)
    truth, spurious = torch.rand(N, generator=g) < 0.5, torch.rand(N, generator=g) < 0.5
    z = torch.stack([truth.float(), spurious.float()], 1)
    codes, atoms = Codes(z, None, 2), torch.eye(2)
    biased, clean = Binary(torch.tensor([1.0, 1.5]).double(), -1.2), Binary(torch.tensor([1.0, 0.0]).double(), -0.5)
    shifted = biased._replace(bias=-0.5)  # without the spurious feature it reads the concept alone
    before, after = shifted.accuracy(z, truth), shifted.accuracy(ablate(z, codes, atoms, torch.tensor([1])), truth)
    assert before < 0.8 and after == clean.accuracy(z, truth)
