"""Sparse products against dense ones in float64."""

import pytest
import torch

from mmsae.kernels.triton import sparse

SIZES = [(1, 1, 1, 1), (5, 40, 3, 7), (3, 9, 9, 100), (7, 30, 5, 257), (3, 12, 2, 1030)]
TYPES = [torch.float32, torch.bfloat16]


def close(got, want):
    assert got.dtype == torch.float32
    assert (got.double() - want).norm() <= 3e-7 * want.norm()


def normal(*shape, dtype=torch.float32, seed=0, device="cpu"):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def code(n, f, k, device, seed=0):
    """Values and indices of a code, and the code as a dense float64 matrix."""
    g = torch.Generator().manual_seed(seed)
    values, indices = normal(n, k, seed=seed, device=device), torch.rand(n, f, generator=g).topk(k).indices.to(device)
    return values, indices, dense(values, indices, f)


def dense(values, indices, f):
    out = torch.zeros(len(values), f, dtype=torch.double, device=values.device)
    return out.scatter(1, indices, values.double())


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("n", "f", "k", "d"), SIZES)
def test_products_are_those_of_dense_matrices(device, dtype, n, f, k, d):
    values, indices, codes = code(n, f, k, device)
    table, x = (normal(m, d, dtype=dtype, seed=s, device=device) for s, m in enumerate((f, n)))
    close(sparse.bag(values, indices, table), codes @ table.double())
    close(sparse.sampled(x, table, indices), (x.double() @ table.double().t()).gather(1, indices))
    totals = torch.full((f,), torch.nan, device=device)
    close(sparse.scatter(values, indices, x, f, totals=totals), codes.t() @ x.double())
    assert (totals.double() - codes.sum(0)).abs().max() < 1e-6


def test_many_entries_a_row(device):
    values, indices, codes = code(2, 300, 256, device)
    table, x = normal(300, 33, device=device), normal(2, 33, seed=1, device=device)
    close(sparse.bag(values, indices, table), codes @ table.double())
    close(sparse.sampled(x, table, indices), (x.double() @ table.double().t()).gather(1, indices))


def hub(n, f, k, device, latent=3):
    """A code of which one latent is in every row."""
    indices = torch.rand(n, f - 1, generator=torch.Generator().manual_seed(0)).topk(k - 1).indices
    indices = torch.cat([indices + (indices >= latent), torch.full((n, 1), latent)], 1).to(device)
    values = normal(n, k, device=device)
    return values, indices, dense(values, indices, f)


@pytest.mark.parametrize(("n", "latent"), [(127, 3), (128, 0), (128, 7), (129, 3), (300, 0), (300, 7), (515, 3)])
def test_segments_longer_than_a_window(device, n, latent):
    values, indices, codes = hub(n, 8, 2, device, latent)
    x = normal(n, 20, device=device)
    close(sparse.scatter(values, indices, x, 8), codes.t() @ x.double())
    totals = torch.full((8,), torch.nan, device=device)
    sums = sparse.scatter(values, indices, x, 8, sparse.segments(indices, 8), totals)
    close(sums, codes.t() @ x.double())
    close(totals, codes.sum(0))
    assert torch.equal(sums, sparse.scatter(values, indices, x, 8))


def test_windows_of_one_latent_are_summed_by_themselves(device, monkeypatch):
    """Without the first pass, sums over long segments lack their windows: it is what makes them."""
    values, indices, _ = hub(300, 8, 2, device)
    calls = []
    kernel = sparse._window_kernel
    monkeypatch.setattr(sparse, "_window_kernel", {(600 // sparse.WINDOW, 1): lambda *a, **k: calls.append(a)})
    monkeypatch.setattr(torch.Tensor, "new_empty", torch.Tensor.new_zeros)
    got = sparse.scatter(values.abs(), indices, torch.ones(300, 1, device=device), 8)[3]
    monkeypatch.setattr(sparse, "_window_kernel", kernel)
    want = sparse.scatter(values.abs(), indices, torch.ones(300, 1, device=device), 8)[3]
    assert len(calls) == 1 and 0 < got < 0.99 * want


def test_segments_are_entries_by_latent_and_by_row(device):
    _, indices, _ = hub(50, 11, 3, device)
    order, starts = sparse.segments(indices, 13)  # two latents more than any index
    assert order.dtype == torch.long and starts.dtype == torch.int32
    flat = indices.reshape(-1)
    assert starts[0] == 0 and starts[-1] == flat.numel() and starts[11] == starts[12] == starts[13]
    for latent in range(13):
        part = order[starts[latent] : starts[latent + 1]]
        assert torch.equal(part, (flat == latent).nonzero()[:, 0])


def test_latents_nobody_has_get_zeros(device):
    values, indices, _ = code(6, 5, 3, device)
    out = sparse.scatter(values, indices + 4, normal(6, 33, device=device), 12)
    assert not out[:4].any() and not out[9:].any() and out[4:9].any(1).all()


def test_runs_are_equal_to_the_bit(device):
    values, indices, _ = hub(300, 6, 2, device)
    x = normal(300, 40, device=device)
    assert torch.equal(sparse.scatter(values, indices, x, 6), sparse.scatter(values, indices, x, 6))


def test_operands_that_are_parts_of_others(device):
    values, indices, codes = code(5, 20, 4, device)
    table, x = normal(50, 60, device=device)[3:43:2, 5:38], normal(40, 5, device=device).t()[:, :33]
    close(sparse.bag(values.t().contiguous().t(), indices.t().contiguous().t(), table), codes @ table.double())
    close(sparse.sampled(x, table, indices), (x.double() @ table.double().t()).gather(1, indices))
    close(sparse.scatter(values, indices, x, 20), codes.t() @ x.double())


def test_no_rows_no_entries(device):
    table = normal(9, 5, device=device)
    for n, k in ((0, 3), (4, 0)):
        values, x = torch.zeros(n, k, device=device), torch.ones(n, 5, device=device)
        indices = values.long()
        assert torch.equal(sparse.bag(values, indices, table), torch.zeros(n, 5, device=device))
        assert sparse.sampled(x, table, indices).shape == (n, k)
        assert torch.equal(sparse.scatter(values, indices, x, 9), torch.zeros(9, 5, device=device))


def test_another_number_of_inputs_is_refused(device):
    values, indices, _ = code(5, 20, 4, device)
    with pytest.raises(ValueError, match=r"inputs must be \(5, 8\), not \(4, 8\)"):
        sparse.scatter(values, indices, normal(4, 8, device=device), 20)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("n", "f", "k", "d"), [(4096, 6144, 32, 768), (2048, 6144, 256, 768), (1024, 4096, 64, 4096)])
def test_products_at_sizes_of_trainings(dtype, n, f, k, d):
    test_products_are_those_of_dense_matrices("cuda", dtype, n, f, k, d)
    values, indices, codes = hub(n, f, k, "cuda")
    x = normal(n, d, dtype=dtype, device="cuda")
    close(sparse.scatter(values, indices, x, f), codes.t() @ x.double())
