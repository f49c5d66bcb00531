"""Similarity of dictionaries: 1 for the same, equal under what must not matter, and chance levels that are right."""

import math

import pytest
import torch
from torch.nn.functional import normalize

from mmsae import InputError
from mmsae.metrics import dictionary_similarity

G = torch.Generator().manual_seed(0)
X = torch.randn(400, 24, generator=G) @ torch.randn(24, 24, generator=G) + 1
Q = torch.linalg.qr(torch.randn(24, 24, generator=G))[0]
ATOMS = normalize(torch.randn(60, 24, generator=G))


def names(ids):
    return torch.stack([torch.as_tensor(ids), torch.zeros(len(ids), dtype=torch.long)], 1)


@pytest.mark.parametrize("kind", ["cka", "svcca", "relative"])
def test_representations_do_not_change_under_rotation_and_scale(kind):
    assert dictionary_similarity(X, X, kind).value == pytest.approx(1, abs=1e-6)
    for other in (X @ Q, 7 * X, torch.cat([X @ Q, torch.zeros(400, 5)], 1)):
        assert dictionary_similarity(X, other, kind).value == pytest.approx(1, abs=1e-5)
    noisy = dictionary_similarity(X, X @ Q + 5 * torch.randn(400, 24, generator=G), kind)
    assert noisy.chance < noisy.value < 0.99
    unrelated = dictionary_similarity(X, torch.randn(400, 16, generator=G) + 1, kind)
    assert unrelated.value == pytest.approx(unrelated.chance, abs=0.05)
    assert abs(unrelated.above_chance) < 0.15


def test_cka_is_that_of_centred_inner_products():
    y = X[:, :10].tanh()
    kx, ky = ((t - t.mean(0)) @ (t - t.mean(0)).T for t in (X.double(), y.double()))
    expected = (kx * ky).sum() / (kx.norm() * ky.norm())
    assert dictionary_similarity(X, y, "cka").value == pytest.approx(float(expected), abs=1e-9)
    assert dictionary_similarity(X, y + 100, "cka").value == pytest.approx(float(expected), abs=1e-6)


def test_svcca_finds_the_directions_that_are_shared():
    shared = torch.randn(400, 3, generator=G)
    a, b = (torch.cat([9 * shared, torch.randn(400, 3, generator=G)], 1) @ Q[:6, :6] for _ in range(2))
    assert dictionary_similarity(a, b, "svcca", size=3).value > 0.98
    assert dictionary_similarity(a, b, "svcca", size=6).value == pytest.approx(0.5, abs=0.1)


def test_atoms_are_matched_one_to_one():
    order = torch.randperm(60, generator=G)
    same = dictionary_similarity(ATOMS, 3 * ATOMS[order])
    assert same.value == pytest.approx(1) and same.above_chance == pytest.approx(1)
    # one atom of b cannot stand for all of a
    hub = torch.cat([ATOMS[:1].expand(59, -1), ATOMS[1:2]])
    assert dictionary_similarity(ATOMS, hub).value < 0.2
    fewer = dictionary_similarity(ATOMS, ATOMS[:20])
    assert fewer.value == pytest.approx(1) and 0.2 < fewer.chance < 0.9
    other = dictionary_similarity(ATOMS, normalize(torch.randn(60, 24, generator=G)))
    assert other.value == pytest.approx(other.chance, abs=0.03)


def test_jaccard_counts_names():
    a, b = names(range(0, 30)), names(range(20, 60))
    assert dictionary_similarity(a, a, "jaccard").value == 1
    assert dictionary_similarity(a, b, "jaccard").value == 10 / 60
    assert math.isnan(dictionary_similarity(a, b, "jaccard").chance)
    unused = torch.cat([a, torch.full((9, 2), -1)])
    assert dictionary_similarity(unused, a, "jaccard").value == 1
    other_position = a.clone()
    other_position[:, 1] = 3
    assert dictionary_similarity(a, other_position, "jaccard").value == 0


def test_chance_of_jaccard_is_that_of_random_subsets():
    draw = [names(torch.randperm(768, generator=G)[:n]) for n in (335, 335, 100)]
    equal = dictionary_similarity(draw[0], draw[1], "jaccard", population=768)
    assert equal.chance == pytest.approx(0.279, abs=1e-3)
    assert equal.value == pytest.approx(equal.chance, abs=0.05)
    unequal = dictionary_similarity(draw[0], draw[2], "jaccard", population=768)
    assert unequal.value == pytest.approx(unequal.chance, abs=0.05)


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(InputError, match="not 'cosine'"):
        dictionary_similarity(X, X, "cosine")
    with pytest.raises(InputError, match="widths 24 and 10"):
        dictionary_similarity(X, X[:, :10])
    with pytest.raises(InputError, match="not 400 and 399 rows"):
        dictionary_similarity(X, X[:-1], "cka")
    with pytest.raises(InputError, match="integer names"):
        dictionary_similarity(X, X, "jaccard")
    with pytest.raises(InputError, match="population is 5"):
        dictionary_similarity(names(range(4)), names(range(3, 9)), "jaccard", population=5)
    with pytest.raises(InputError, match="not 0 and 3"):
        dictionary_similarity(torch.full((2, 2), -1), names(range(3)), "jaccard")
