"""Selection by group maxima chooses what a stable sort chooses, whatever the entries are."""

import pytest
import torch

from mmsae.kernels import grouped
from mmsae.kernels.backend import Ranking
from mmsae.kernels.plain import TorchBackend


def entries(kind: str, n: int, f: int, k: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(f + k)
    u = torch.randn(n, f, generator=g)
    if kind == "ties":  # ten different numbers
        return (u * 2).round() / 2
    if kind == "few positive":  # as after a ReLU: fewer than k in most rows
        return torch.where(torch.rand(n, f, generator=g) < 0.5 * k / f, u.abs(), 0.0)
    if kind == "masked":  # as few finite ones
        return torch.where(torch.rand(n, f, generator=g) < 0.5 * k / f, u, -torch.inf)
    if kind == "one constant row":
        u[n // 2] = 1.0
    if kind == "sorted":  # the largest are neighbours
        return u.sort(1).values
    if kind == "one group":  # the largest are all in columns that one group could have
        u[:, :: max(1, f // 256)] += 10
    if kind == "bfloat16":  # has ties too
        return u.bfloat16()
    return u.double() if kind == "float64" else u


def stable(u: torch.Tensor, k: int) -> torch.Tensor:
    return u.sort(dim=1, descending=True, stable=True).indices[:, :k].sort(1).values


KINDS = ["normal", "ties", "few positive", "masked", "one constant row", "sorted", "one group", "bfloat16", "float64"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("f", "k"), [(4096, 1), (4096, 256), (2003, 32), (8192, 32), (130, 32), (100, 40), (24, 24), (7, 1)]
)
def test_the_k_largest_of_every_row_and_of_equal_ones_the_first(kind, f, k):
    u = entries(kind, 50, f, k)
    values, ids = grouped.topk(u, k)
    assert values.dtype == u.dtype and ids.dtype == torch.int64
    assert torch.equal(ids, stable(u, k)) and torch.equal(values, u.gather(1, ids))


def test_as_many_threads_as_there_may_be_choose_the_same(monkeypatch):
    u = entries("ties", 50, 2048, 32)
    few = grouped.topk(u, 32)
    monkeypatch.setattr(grouped, "THREADS", 0)
    assert all(torch.equal(a, b) for a, b in zip(few, grouped.topk(u, 32), strict=True))


def test_a_matrix_that_is_not_in_one_block_and_one_without_rows():
    u = entries("normal", 2000, 40, 4).t()
    assert torch.equal(grouped.topk(u, 4)[1], stable(u, 4))
    values, ids = grouped.topk(u[:0], 4)
    assert values.shape == ids.shape == (0, 4)
    ids, on = grouped.above(u[:0], torch.tensor(1.0))
    assert ids.shape == on.shape == (0, 1)


def test_what_is_not_a_number_counts_as_infinite():
    u = entries("normal", 6, 4096, 8)
    u[1, 17] = u[1, 4000] = torch.nan
    u[2] = torch.nan
    u[3, :9] = torch.inf
    want = stable(torch.where(u.isnan(), torch.inf, u), 8)
    assert torch.equal(grouped.topk(u, 8)[1], want)


@pytest.mark.parametrize("width", [1, 300])
def test_entries_above_a_threshold_come_first_and_the_others_are_such_as_the_row_has_not(width):
    u = entries("ties", 40, 300, 8)
    threshold = torch.full((width,), 2.0)
    threshold[-1] = 1.5
    ids, on = grouped.above(u, threshold, 3)
    want = u > threshold
    assert ids.shape[1] == max(3, int(want.sum(1).max())) and torch.equal(on.sum(1), want.sum(1))
    assert torch.equal(torch.zeros_like(want).scatter(1, ids, on), want)
    assert (ids.sort(1).values.diff(dim=1) > 0).all()
    assert (on.int().diff(dim=1) <= 0).all() and (ids.diff(dim=1)[on[:, 1:]] > 0).all()


def test_a_threshold_is_not_rounded_to_the_entries_precision():
    u = torch.tensor([[1.0, 1.0078125, 2.0]]).bfloat16()
    assert grouped.above(u, torch.tensor(1.005))[1].sum() == 2


@pytest.mark.parametrize("ranking", [None, Ranking(absolute=True)])
def test_the_cpus_backend_chooses_by_it_where_it_pays(ranking):
    u = entries("ties", 20, grouped.LEAST, 8)
    values, ids = TorchBackend().topk(u, 8, ranking)
    assert torch.equal(ids, stable(u if ranking is None else u.abs(), 8)) and torch.equal(values, u.gather(1, ids))
    ids, on = TorchBackend().above(u, torch.tensor(1.0))
    assert torch.equal(torch.zeros_like(u).bool().scatter(1, ids, on), u > 1)
    assert grouped.pays(u.device, grouped.LEAST) and not grouped.pays(u.device, grouped.LEAST - 1)
    assert not grouped.pays(u.device, 2048, 513) and not grouped.pays(torch.device("cuda"), 8192)


def parts(u: torch.Tensor, size: int, passes: list, budget: int):
    def reaching(slack: float):
        passes.append(slack)
        return grouped.reaching(((rows, rows.abs()) for rows in u.split(size)), len(u), budget, slack)

    return reaching


@pytest.mark.parametrize("order", ["any", "first rows larger", "first rows of few that are large"])
@pytest.mark.parametrize("kind", ["normal", "ties", "float64"])
def test_a_batchs_largest_scores_wherever_its_rows_are(kind, order):
    u = entries(kind, 64, 1100, 8)
    if order != "any":
        u = u * torch.linspace(1, 3, 64)[:, None].flip(0) ** 2  # the first part holds more than its share
    if order == "first rows of few that are large":
        u[:8] = 0.0
        u[:8, :63] = 1e4
    passes: list = []
    found = grouped.largest(parts(u, 8, passes, 64 * 8), 64, 1100, 64 * 8)
    flat = u.abs().reshape(-1).sort(descending=True, stable=True)
    want = torch.zeros(64 * 1100, dtype=torch.bool).index_fill(0, flat.indices[: 64 * 8], True).view(64, 1100)
    want &= u != 0
    assert torch.equal(torch.zeros_like(want).scatter(1, found.indices, found.kept), want)
    assert torch.equal(found.values[found.kept], u.gather(1, found.indices)[found.kept])
    assert found.least == u.abs()[want].min() and found.values.dtype == u.dtype
    assert (found.indices.sort(1).values.diff(dim=1) > 0).all() and (len(passes) == 1) == (order == "any")


def test_a_budget_that_is_larger_than_what_is_positive_and_one_of_nothing():
    u = torch.zeros(4, 1100)
    u[1, 5], u[1, 7], u[3, 2] = 1.0, 3.0, 2.0
    found = grouped.largest(parts(u, 2, [], 10), 4, 1100, 10)
    assert found.kept.sum() == 3 and found.least == 1.0 and found.indices.shape == (4, 2)
    for empty in (
        grouped.largest(parts(u, 2, [], 0), 4, 1100, 0),
        grouped.largest(parts(u * 0, 2, [], 10), 4, 1100, 10),
    ):
        assert not empty.kept.any() and empty.least == torch.inf and empty.indices.shape == (4, 1)


def test_entries_that_are_equal_to_a_threshold_count_where_they_shall():
    u = entries("ties", 40, 300, 8)
    for inclusive in (False, True):
        ids, on = grouped.above(u, torch.tensor(1.5), inclusive=inclusive)
        want = u >= 1.5 if inclusive else u > 1.5
        assert torch.equal(torch.zeros_like(want).scatter(1, ids, on), want)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("f", "k"), [(819, 256), (100, 40), (24, 24), (7, 1)])
def test_the_k_largest_are_marked_and_of_equal_ones_the_first(kind, f, k):
    for n in (0, 9):
        u = entries(kind, n, f, k) if n or kind != "one constant row" else torch.zeros(0, f)
        want = torch.zeros(n, f, dtype=u.dtype).scatter(1, stable(u, k), 1)
        assert torch.equal(grouped.marked(u, k), want)
