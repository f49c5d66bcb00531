"""Primitive edits, their composition, and YAML."""

import itertools
import math

import pytest
import torch
import yaml

from mmsae import InputError
from mmsae.hosts.sites import Where
from mmsae.steering import Edit

Z = torch.tensor([[0.0, 1.0, 3.0], [2.0, 0.0, 0.5]])


@pytest.mark.parametrize(
    ("edit", "want"),
    [
        (Edit.set([0, 1, 2], 5), [[5, 5, 5], [5, 5, 5]]),
        (Edit.set([0, 1, 2], [5, 6, 7]), [[5, 6, 7], [5, 6, 7]]),
        (Edit.add([0, 1, 2], -1), [[0, 0, 2], [1, 0, 0]]),
        (Edit.scale([0, 1, 2], -2), [[0, -2, -6], [-4, 0, -1]]),
        (Edit.clamp([0, 1, 2], hi=1), [[0, 1, 1], [1, 0, 0.5]]),
        (Edit.clamp([0, 1, 2], lo=1), [[1, 1, 3], [2, 1, 1]]),
        (Edit.clamp([0, 1, 2], lo=[0.5, 0, 0], hi=[1, 2, 2]), [[0.5, 1, 2], [1, 0, 0.5]]),
        (Edit.ablate([0, 1, 2]), [[0, 0, 0], [0, 0, 0]]),
        (Edit.ablate([0, 1, 2], mean=[0.1, 0.2, 0.3]), [[0.1, 0.2, 0.3]] * 2),
        (Edit.swap([0, 1, 2], [9, 8, 7]), [[9, 8, 7]] * 2),
        (Edit.mix([0, 1, 2], [4, 4, 4], 0.25), [[1, 1.75, 3.25], [2.5, 1, 1.375]]),
    ],
)
def test_primitives(edit, want):
    assert torch.allclose(edit.apply(Z), torch.tensor(want, dtype=torch.float32), atol=1e-6)


def test_signed_codes_are_not_clipped():
    assert Edit.add([0, 1, 2], -1).apply(Z, signed=True).min() == -1


def test_cond_scale():  # T19
    edit = Edit.cond_scale([0, 1, 2], -3, [1.0, 1.0, 1.0])
    assert torch.equal(edit.apply(Z), torch.tensor([[0.0, 1.0, -9.0], [-6.0, 0.0, 0.5]]))  # at tau itself: unchanged
    off = Edit.cond_scale([0, 1, 2], 0.0, 1.0).apply(Z)
    assert torch.equal(off, torch.where(Z > 1, Edit.ablate([0, 1, 2]).apply(Z), Z))
    mu = torch.tensor([0.5, 2.0, 4.0])
    assert torch.equal(Edit.cond_scale([0, 1, 2], (1 / mu) * mu, 0.0).apply(Z), Z)


def test_order_counts_on_the_same_feature():  # T4
    assert (Edit.set(1, 5.0) + Edit.scale(1, 2.0)).apply(Z[:, 1:2]).eq(10).all()
    assert (Edit.scale(1, 2.0) + Edit.set(1, 5.0)).apply(Z[:, 1:2]).eq(5).all()
    once, twice = Edit.ablate(1), Edit.ablate(1) + Edit.ablate(1)
    assert torch.equal(once.apply(Z[:, 1:2]), twice.apply(Z[:, 1:2]))


def test_disjoint_edits_commute_bit_exactly():  # T4
    z = torch.rand(40, 6)
    edits = [Edit.scale([0, 5], [0.3, -7]), Edit.set(2, 0.1), Edit.add([1, 4], 0.7) + Edit.clamp(4, hi=1.1)]
    results = [sum(order, Edit()).apply(z[:, [0, 1, 2, 4, 5]]) for order in itertools.permutations(edits)]
    assert all(torch.equal(r, results[0]) for r in results)
    assert all(sum(order, Edit()).ids == (0, 1, 2, 4, 5) for order in itertools.permutations(edits))


def test_columns_are_in_order_of_id():
    edit = Edit.set([7, 3], [70.0, 30.0])
    assert edit.ids == (3, 7) and edit.apply(torch.zeros(1, 2)).tolist() == [[30, 70]]


def test_sources_by_position_and_item():
    where = Where(torch.tensor([0, 0, 1]), torch.tensor([0, 2, 1]))
    z = torch.zeros(3, 1)
    src = torch.tensor([[10.0], [11.0], [12.0]])
    assert Edit.swap(4, src).apply(z, where)[:, 0].tolist() == [10, 12, 11]
    assert Edit.swap(4, torch.stack([src, src + 100])).apply(z, where)[:, 0].tolist() == [10, 12, 111]
    assert Edit.swap(4, src).apply(z, Where(torch.tensor([2, 0, 1])))[:, 0].tolist() == [12, 10, 11]  # pooled: by item
    with pytest.raises(InputError, match="has 3 rows, but row 4"):
        Edit.swap(4, src).apply(z, Where(torch.tensor([0, 0, 0]), torch.tensor([0, 4, 1])))


def test_yaml_round_trip():
    edit = (
        Edit.set([5, 2], [1.0, 2.0]) + Edit.clamp(3, hi=4.0) + Edit.cond_scale(9, -5.0, 0.25) + Edit.ablate(1, "corpus")
        + Edit.swap([1, 2], torch.rand(3, 2)) + Edit.mix(0, [1.0], 0.5) + Edit.add(8, -1)
    )  # fmt: skip
    text = yaml.safe_dump(edit.to_dict())
    again = Edit.from_dict(yaml.safe_load(text))
    assert again == edit and again != Edit.set([5, 2], [1.0, 2.5])
    assert Edit.from_dict(Edit.scale(None, 1.5).to_dict()).everything
    assert Edit.from_dict([]) == Edit()


def test_strength_multiplies_strengths_and_factors_only():
    edit = Edit.clamp(0, hi=4.0) + Edit.cond_scale(1, -5.0, 0.25) + Edit.add(2, [3.0])
    twice = edit.times(2)
    assert twice == Edit.clamp(0, hi=8.0) + Edit.cond_scale(1, -10.0, 0.25) + Edit.add(2, [6.0])
    assert twice.ops[0].args["lo"] == -math.inf and edit.times(0).ops[0].args == {"lo": -math.inf, "hi": 0.0}


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Edit.set([1, 1], 2), "distinct"),
        (lambda: Edit.set([-1], 2), "not negative"),
        (lambda: Edit.set([1, 2], [1, 2, 3]), r"v has shape \(3,\), but there are 2 features"),
        (lambda: Edit.swap([1, 2], [1.0]), "does not end in the 2 features"),
        (lambda: Edit.set(1, "corpus"), "not a number"),
        (lambda: Edit.scale(None, 2) + Edit.set(1, 2), "stands alone"),
        (lambda: Edit.from_dict([{"op": "boost", "ids": [1]}]), "'boost' is not one of"),
        (lambda: Edit.from_dict([{"op": "set", "ids": [1], "w": 1}]), "takes v, not w"),
        (lambda: Edit.from_dict([{"op": "set", "ids": [1]}]), "missing"),
        (lambda: Edit.from_dict([{"op": "set", "v": 1}]), "needs ids"),
        (lambda: Edit.set(48, 1.0).check(48), r"feature 48 is not one of the SAE's 48 latents"),
    ],
)
def test_refused(make, says):
    with pytest.raises(InputError, match=says):
        make()
