"""Thresholds and what is above them, against sorts and masks."""

import pytest
import torch

from mmsae.kernels.triton import select

TYPES = [torch.float32, torch.bfloat16, torch.float16]


def normal(*shape, dtype=torch.float32, seed=0, device="cpu"):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("n", "f"), [(1, 1), (3, 7), (5, 257), (2, 9000)])
def test_batch_threshold_is_that_of_a_sort(device, dtype, n, f):
    scores = normal(n, f, dtype=dtype, device=device)
    check(scores, {1, n * f // 40 + 1, n * f})
    check(scores.relu().round(), {n * f // 4 + 1})  # many equal ones, and zeros


def check(scores, budgets):
    positive = scores[scores > 0].sort(descending=True).values
    for budget in budgets:
        got = select.batch_threshold(scores, budget)
        want = positive[min(budget, len(positive)) - 1] if len(positive) else torch.full_like(got, torch.inf)
        assert got.shape == () and got.dtype == scores.dtype and torch.equal(got, want), budget


def test_batch_threshold_of_many_orders_of_magnitude(device):
    scores = normal(3, 400, device=device).mul(30).exp2()
    scores[0, :5] = torch.tensor([torch.inf, 3e38, 1e-44, -torch.inf, -0.0])
    check(scores, (2, 3, 1000, 1197, 5000))


def test_batch_threshold_where_nothing_is_positive(device):
    for scores in (
        -normal(4, 50, device=device).abs(),
        torch.zeros(2, 3, device=device),
        torch.zeros(0, 9, device=device),
    ):
        assert select.batch_threshold(scores, 3) == torch.inf
    with pytest.raises(ValueError, match="at least 1, not 0"):
        select.batch_threshold(torch.zeros(2, 3, device=device), 0)


@pytest.mark.parametrize("inclusive", [False, True])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("f", "per_column"), [(1, False), (7, True), (257, True), (257, False), (5000, True)])
def test_above_is_what_a_mask_says(device, dtype, f, per_column, inclusive):
    scores = normal(4, f, dtype=dtype, device=device).mul(2).round()
    threshold = normal(f, seed=1, device=device).round() if per_column else torch.tensor(1.0, device=device)
    on = scores >= threshold if inclusive else scores > threshold
    counts = select.count_above(scores, threshold, inclusive)
    assert counts.dtype == torch.int32 and torch.equal(counts, on.sum(1).int())
    most = int(counts.max())
    for width in {most, min(most + 3, f), most // 2, f}:
        indices, kept = select.above(scores, threshold, width, inclusive)
        assert indices.dtype == torch.long and kept.dtype == torch.bool and indices.shape == kept.shape == (4, width)
        assert torch.equal(kept.sum(1), counts.long().clamp(max=width))
        for i in range(4):
            assert torch.equal(indices[i][kept[i]], on[i].nonzero()[:width, 0])
            rest = indices[i][~kept[i]]
            assert torch.equal(rest, (~on[i]).nonzero()[: len(rest), 0])
            assert (kept[i].int().diff() <= 0).all()


def test_a_batch_threshold_keeps_its_budget(device):
    scores = normal(6, 300, device=device)
    threshold = select.batch_threshold(scores, 50)
    width = int(select.count_above(scores, threshold, True).max())
    indices, on = select.above(scores, threshold, width, inclusive=True)
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter(1, indices, on)
    assert on.sum() == 50 and scores[kept].min() > scores[~kept].max()


def test_above_refuses_what_does_not_fit(device):
    scores = torch.zeros(2, 10, device=device)
    with pytest.raises(ValueError, match="from 0 to the number of columns 10, not 11"):
        select.above(scores, torch.tensor(0.0, device=device), 11)
    with pytest.raises(ValueError, match=r"one number or \(10,\), not \(9,\)"):
        select.count_above(scores, torch.zeros(9, device=device))
    assert select.above(scores[:0], torch.zeros(10, device=device), 3)[1].shape == (0, 3)
    assert select.count_above(scores[:0], torch.zeros(10, device=device)).shape == (0,)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", TYPES)
def test_batch_threshold_at_sizes_of_trainings(dtype):
    scores = normal(4096, 6144, dtype=dtype, device="cuda")
    check(scores, (4096, 4096 * 32, 4096 * 3500))
