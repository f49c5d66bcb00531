"""Choices against torch.topk and sorts."""

import pytest
import torch

from mmsae.kernels.triton import select

TYPES = [torch.float32, torch.bfloat16, torch.float16]


def normal(*shape, dtype=torch.float32, seed=0, device="cpu"):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def by_sort(score, k):
    """Columns of the k largest scores, the first ones of equal scores, in ascending order."""
    order = score.sort(dim=1, descending=True, stable=True).indices
    return order[:, :k].sort(dim=1).values


def check(matrix, k, score=None, **kwargs):
    values, indices = select.topk(matrix, k, **kwargs)
    assert values.dtype == matrix.dtype and indices.dtype == torch.long
    assert torch.equal(indices, by_sort(matrix if score is None else score, k))
    assert torch.equal(values, matrix.gather(1, indices))
    return indices


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("n", "f", "k"),
    [(1, 1, 1), (3, 7, 1), (2, 7, 7), (3, 100, 99), (5, 257, 8), (3, 1000, 1), (2, 1000, 256), (2, 4096, 32)],
)
def test_topk_is_that_of_torch(device, dtype, n, f, k):
    matrix = normal(n, f, dtype=dtype, device=device)
    indices = check(matrix, k)
    assert torch.equal(matrix.gather(1, indices).sort(1).values, matrix.topk(k).values.sort(1).values)


@pytest.mark.parametrize(("f", "k", "group"), [(9000, 130, 16), (17000, 600, 8), (40000, 1024, 8), (1100000, 3, 64)])
def test_groups_of_every_size(device, f, k, group):
    assert select._plan(f, k) == group
    check(normal(1, f, device=device), k)


def test_rows_too_large_for_a_program_are_sorted(device):
    matrix = normal(1, 50000, device=device)
    assert select._plan(50000, 20000) is None
    check(matrix, 20000)
    check(matrix, 20000, matrix.abs(), absolute=True)
    check(matrix.round(), 20000)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("f", [40, 257, 3000])
def test_of_equal_scores_the_first_columns_win(device, dtype, f):
    check(normal(4, f, device=device).round().to(dtype), 20)  # about nine different numbers
    check(torch.zeros(2, f, dtype=dtype, device=device), 20)
    few = torch.zeros(2, f, dtype=dtype, device=device)
    few[:, 7::13], few[:, 5] = 1, -1
    check(few, 10)
    check(few, f)


def test_minus_zero_is_zero(device):
    matrix = torch.zeros(2, 300, device=device)
    matrix[:, :250] *= -1
    assert torch.equal(select.topk(matrix, 3)[1], torch.arange(3, device=device).expand(2, 3))


@pytest.mark.parametrize("k", [1, 5, 40])
def test_rows_of_one_sign_and_extreme_numbers(device, k):
    matrix = normal(6, 500, device=device).abs()
    matrix[0] *= -1
    matrix[1] = -torch.inf
    matrix[2, ::2] = -torch.inf
    matrix[3, ::50] = torch.inf
    matrix[4] *= 1e-44  # subnormal
    matrix[5] *= 3e38
    check(matrix, k)


@pytest.mark.filterwarnings("ignore:All-NaN slice")
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("f", "k"), [(100, 7), (3000, 32), (1030, 256)])
def test_numbers_that_are_none_choose_ids_of_the_row_and_keep_nothing(device, dtype, f, k):
    """A training that diverged goes on to the step that finds it, and reads and writes nowhere else."""
    matrix = normal(5, f, dtype=dtype, device=device)
    matrix[0] = torch.nan
    matrix[1, ::2] = torch.nan
    matrix[2, 5] = -torch.nan
    matrix[3, :-1] = torch.nan
    ids = select.topk(matrix, k)[1].sort(1).values
    assert ids[:, 0].min() >= 0 and ids[:, -1].max() < f and (ids.diff(dim=1) > 0).all()
    assert torch.equal(ids[4], by_sort(matrix, k)[4])  # rows without any are as they are
    threshold = select.batch_threshold(matrix, 20)
    counts = select.count_above(matrix, threshold, True)
    ids, on = select.above(matrix, threshold, max(1, int(counts.max())), True)
    assert ids.min() >= 0 and ids.max() < f and torch.equal(on.sum(1), counts.long())


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("f", [100, 2000])
def test_absolute_values_and_factors(device, dtype, f):
    matrix, factor = normal(3, f, dtype=dtype, device=device), normal(f, seed=1, device=device)
    check(matrix, 9, matrix.abs(), absolute=True)
    check(matrix, 9, matrix.float() * factor, factor=factor)
    check(matrix, 9, (matrix.float() * factor).abs(), absolute=True, factor=factor)


def test_matrices_that_are_parts_of_others(device):
    matrix = normal(6, 1203, device=device)
    check(matrix[1::2, 3:], 5)
    check(matrix[:, ::3], 5)
    check(matrix.t()[:5], 2)
    check(matrix[:1].expand(3, -1), 5)


def test_no_rows_and_no_entries(device):
    for n, f, k in ((0, 50, 3), (4, 50, 0)):
        values, indices = select.topk(torch.zeros(n, f, device=device), k)
        assert values.shape == indices.shape == (n, k)


@pytest.mark.parametrize("k", [-1, 11])
def test_impossible_k(device, k):
    with pytest.raises(ValueError, match="from 0 to the number of columns 10"):
        select.topk(torch.zeros(2, 10, device=device), k)


def test_other_types_are_refused(device):
    with pytest.raises(ValueError, match="float64"):
        select.topk(torch.zeros(2, 10, device=device, dtype=torch.float64), 1)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("f", "groups"), [(1, 1), (7, 7), (12, 4), (1000, 8), (1030, 1), (3000, 2), (96, 32)])
def test_group_max_is_argmax_of_the_parts(device, dtype, f, groups):
    matrix = normal(3, f, dtype=dtype, device=device)
    for m in (matrix, matrix.round(), torch.full_like(matrix, -torch.inf)):
        values, indices = select.group_max(m, groups)
        parts = m.unflatten(1, (groups, -1))
        first = (parts == parts.amax(2, keepdim=True)).to(torch.uint8).argmax(2)
        assert torch.equal(indices, first + torch.arange(groups, device=device) * (f // groups))
        assert values.dtype == dtype and torch.equal(values, m.gather(1, indices))


def test_groups_have_equal_size(device):
    with pytest.raises(ValueError, match="10 columns are not 4 groups"):
        select.group_max(torch.zeros(2, 10, device=device), 4)
    assert select.group_max(torch.zeros(0, 10, device=device), 5)[1].shape == (0, 5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("f", "k"), [(4096, 32), (6144, 256), (32768, 32), (32768, 1024), (131072, 64)])
def test_topk_at_sizes_of_trainings(dtype, f, k):
    matrix = normal(300, f, dtype=dtype, device="cuda")
    assert torch.equal(check(matrix, k), select.topk(matrix, k)[1])
