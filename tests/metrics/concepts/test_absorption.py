"""Absorption by planted children, targeted perturbation of disjoint and of shared features, removal of a bias."""

import itertools

import pytest
import torch

from mmsae.metrics.concepts.absorption import (
    Binary,
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


@pytest.fixture
def sparse(monkeypatch):
    """Rows that the SAE misses a part of, sparse codes with signs and zeros, atoms; their matrix is not made."""
    g = torch.Generator().manual_seed(3)
    f, k = 30, 6
    indices = torch.rand(N, f, generator=g).topk(k).indices
    values = torch.randn(N, k, generator=g).double() * (torch.rand(N, k, generator=g) > 0.2)
    codes, atoms = Codes(values, indices, f), torch.randn(f, D, generator=g).double()
    dense = codes.to_dense()
    x = dense @ atoms + 0.5 * torch.randn(N, D, generator=g).double()
    monkeypatch.setattr(Codes, "to_dense", lambda self: pytest.fail("a matrix of codes is made"))
    return x, codes, dense, atoms, g


def test_effects_are_those_of_the_matrix(sparse):
    _, codes, dense, atoms, g = sparse
    truth, p = torch.rand(N, generator=g) < 0.3, torch.randn(D, generator=g).double()
    want = (dense[truth].mean(0) - dense[~truth].mean(0)) * (atoms @ p)
    torch.testing.assert_close(effects(codes, truth, atoms, p), want, rtol=1e-12, atol=1e-12)


def test_absorption_is_that_of_the_matrix(sparse):
    x, codes, dense, atoms, g = sparse
    p = torch.nn.functional.normalize(atoms[4] + atoms[9] + torch.randn(D, generator=g), dim=0)
    main = torch.tensor([4, 9])
    cos = torch.nn.functional.normalize(atoms, dim=1) @ p
    fraction, full = [], []
    for row, code in zip(x, dense, strict=True):
        part = code * cos
        mains, projection = part[main].sum(), row @ p
        others = {j: part[j] for j in range(len(atoms)) if j not in main.tolist()}
        near = sorted((v for j, v in others.items() if cos[j] >= 0.1 and v > 0), reverse=True)[:3]
        absorbers = sum(near, torch.zeros(()).double())
        if absorbers < 0.4 * projection or mains >= projection or projection <= 0:
            fraction.append(0.0)
        elif mains <= 0:
            fraction.append(1.0)
        else:
            rest = min(absorbers, projection - mains)
            fraction.append((rest / (rest + mains)).item())
        best = max(others, key=others.get)
        carries = others[best] >= 0.4 * projection and projection > 0 and cos[best] >= 0.025
        full.append(bool(carries and not code[main].any()))
    got = absorption(x, codes, atoms, p, main)
    torch.testing.assert_close(got.fraction, torch.tensor(fraction, dtype=torch.float64), rtol=1e-9, atol=1e-9)
    assert got.full.tolist() == full and 0 < sum(full) < N and 0 < got.fraction.mean() < 1


def test_ablation_is_that_of_the_rows_and_keeps_what_the_sae_misses(sparse):
    x, codes, dense, atoms, g = sparse
    probes = [Binary(torch.randn(D, generator=g).double(), 0.3 * c) for c in range(3)]
    truth = torch.stack([p.right(x, torch.ones(N, dtype=torch.bool)) for p in probes], 1)  # what it says, but for some
    truth ^= torch.rand(N, 3, generator=g) < 0.1
    chosen = [torch.randperm(30, generator=g)[:n] for n in (8, 2, 0)]
    drops = []
    for features in chosen:
        y = x.clone()
        for j in features[:4].tolist():
            y -= dense[:, j : j + 1] * atoms[j]
        both = [[p.right(v, truth[:, c]).double().mean().item() for v in (x, y)] for c, p in enumerate(probes)]
        drops.append([before - after for before, after in both])
    want = sum(drops[c][c] - (sum(drops[c]) - drops[c][c]) / 2 for c in range(3)) / 3
    assert tpp(x, codes, atoms, truth, probes, chosen, 4) == pytest.approx(want, abs=1e-12) and want != 0
