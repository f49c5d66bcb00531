"""Entries of codes, sparse or dense, with signs, and what is pooled of them, against loops."""

import numpy as np
import pytest
import torch

from mmsae.interpret.evidence.folder import BINS, EDGES
from mmsae.interpret.evidence.parts import LatentCounts, histogram_bin
from mmsae.interpret.evidence.rows import BatchWords, entries, no_grid
from mmsae.types import Codes

D = 9


def codes(n, dense, seed=0):
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(n, D, generator=g).mul(3).round() / 3  # ties
    z = z * (torch.rand(n, D, generator=g) < 0.4)
    if dense:
        return Codes(z, None, D), z
    order = torch.rand(n, D, generator=g).argsort(1)
    return Codes(z.gather(1, order), order, D), z


@pytest.mark.parametrize("dense", [True, False])
def test_entries_and_pooled_entries_are_those_of_a_loop(dense):
    made, z = codes(20, dense)
    item = torch.tensor([0] * 7 + [2] * 8 + [3] * 5)  # item 1 has no row
    place = torch.cat([torch.randperm(n) for n in (7, 8, 5)])
    found = entries(item, place, made.values, made.indices, no_grid(4), 8, D)
    loop = sorted((int(item[r]), j, int(place[r]), float(z[r, j])) for r in range(20) for j in range(D) if z[r, j])
    assert [tuple(x) for x in zip(*(t.tolist() for t in found[:4]), strict=True)] == loop
    best = {}
    for i, j, p, v in loop:
        if (i, j) not in best or abs(v) > abs(best[i, j][1]):
            best[i, j] = p, v
    pooled = found.pooled(D)
    got = {(i, j): (p, v) for i, j, p, v in zip(*(t.tolist() for t in pooled[:4]), strict=True)}
    assert got == best and list(got) == sorted(got)
    counts = LatentCounts(D)
    counts.add(found, pooled)
    assert (counts.fired_rows == (z != 0).sum(0)).all() and torch.allclose(counts.max, z.abs().amax(0))
    assert torch.allclose(counts.sum, z.double().sum(0)) and counts.rows == 20


def test_some_items_are_counted_anew():
    made, _ = codes(6, True)
    found = entries(torch.tensor([0, 0, 1, 1, 2, 2]), torch.arange(6), made.values, None, no_grid(3), 6, D)
    kept = found.of(torch.tensor([True, False, True]))
    assert set(kept.item.tolist()) == {0, 1} and len(kept.grid) == 2
    assert set(kept.position.tolist()) <= {0, 1, 4, 5}
    words = BatchWords(torch.tensor([0, 1, 2]), torch.tensor([3, 4, 5]), ["a", "b", "c"])
    assert words.of(torch.tensor([False, True, True])).text == ["b", "c"]
    assert words.of(torch.tensor([False, True, True])).item.tolist() == [0, 1]


def test_bins_are_numpys_and_hold_everything():
    value = torch.cat([torch.logspace(-7, 6, 400), torch.from_numpy(EDGES[:-1]).float() * 1.0001, -torch.ones(3)])
    inside = value.abs().double().numpy().clip(EDGES[0], EDGES[-1])
    found = np.bincount(histogram_bin(value).numpy(), minlength=BINS)
    assert (found == np.histogram(inside, EDGES)[0]).all() and found.sum() == len(value)
