"""Cosines of pairs of codes and their gradients against dense formulas in float64."""

import pytest
import torch

from mmsae.kernels import use
from mmsae.kernels.pairs import code_cosine
from mmsae.kernels.triton import pairs
from mmsae.types import Codes

EPS = 1e-12


def codes(n, k, f, seed, device):
    g = torch.Generator().manual_seed(seed)
    ids = torch.rand(n, f, generator=g).topk(k).indices
    return torch.randn(n, k, generator=g).to(device), ids.to(device)


def dense(values, ids, f):
    return torch.zeros(len(values), f, dtype=torch.double, device=values.device).scatter(1, ids, values.double())


def exact(a, ids_a, b, ids_b, up, f):
    """Cosines and gradients by float64 autograd."""
    a, b = (v.double().requires_grad_() for v in (a, b))
    rows = [torch.zeros(len(v), f, dtype=torch.double, device=v.device) for v in (a, b)]
    x, y = (r.scatter(1, i, v) for r, i, v in zip(rows, (ids_a, ids_b), (a, b), strict=True))
    norms = torch.linalg.vector_norm(x, dim=1) * torch.linalg.vector_norm(y, dim=1)
    out = (x * y).sum(1) / norms.clamp(min=EPS)
    return [out.detach(), *torch.autograd.grad((out * up.double()).sum(), (a, b))]


def close(got, want, terms=0.0):
    """``terms``: the size of what cancels, where it does: a cosine of codes of one entry has no gradient."""
    assert got.dtype == torch.float32 and got.shape == want.shape
    assert (got.double() - want).norm() <= 1e-6 * want.norm() + 1e-7 * terms


# k = 1, unequal ones, none a power of two, all latents, 256 of a row
SIZES = [(5, 1, 1, 7), (7, 3, 5, 9), (3, 6, 6, 6), (9, 31, 33, 70), (2, 256, 256, 600), (2, 300, 1, 601)]


@pytest.mark.parametrize(("n", "ka", "kb", "f"), SIZES)
def test_cosines_and_gradients_are_those_of_float64(device, n, ka, kb, f):
    (a, ids_a), (b, ids_b) = codes(n, ka, f, 0, device), codes(n, kb, f, 1, device)
    ids_a[0], ids_b[0, 0] = torch.arange(ka, device=device), 0  # a pair that has a latent in common at least
    ids_b[0, 1:] = torch.arange(1, kb, device=device)
    up = torch.randn(n, generator=torch.Generator().manual_seed(2)).to(device)
    out = pairs.cosine(a, ids_a, b, ids_b, EPS)
    found = [out, *pairs.cosine_gradients(a, ids_a, b, ids_b, out, up, EPS)]
    for got, want in zip(found, exact(a, ids_a, b, ids_b, up, f), strict=True):
        close(got, want, (up / torch.minimum(a.norm(dim=1), b.norm(dim=1))).norm())
    again = pairs.cosine_gradients(a, ids_a, b, ids_b, out, up, EPS)
    assert all(torch.equal(x, y) for x, y in zip(found[1:], again, strict=True))


def test_rows_of_zeros_and_disjoint_ones(device):
    a, b = torch.tensor([[0.0, 0.0], [1.0, 2.0], [0.0, 3.0]]), torch.tensor([[1.0, 2.0], [3.0, 4.0], [0.0, 0.0]])
    ids = torch.tensor([[0, 1], [0, 1], [0, 1]])
    others = torch.tensor([[0, 1], [2, 3], [0, 1]])
    a, b, ids, others = (t.to(device) for t in (a, b, ids, others))
    up = torch.full((1,), 1e-12, device=device).expand(3)  # one number for all rows
    out = pairs.cosine(a, ids, b, others, EPS)
    assert out.tolist() == [0, 0, 0]
    found = pairs.cosine_gradients(a, ids, b, others, out, up, EPS)
    for got, want in zip(found, exact(a, ids, b, others, up, 4)[1:], strict=True):
        close(got, want)
        assert got.isfinite().all()


@pytest.mark.parametrize("mask_top", [0, 1])
def test_the_backend_takes_them(device, mask_top):
    """Also where codes are every second row and column of others, and where the gradient is that of a mean."""
    found = []
    for name in ("reference", "triton"):
        (a, ids_a), (b, ids_b) = codes(14, 5, 12, 0, device), codes(14, 4, 12, 1, device)
        a, b = (v[::2].requires_grad_() for v in (a, b))
        given = [Codes(v, i[::2].repeat_interleave(2, 1)[:, ::2], 12) for v, i in ((a, ids_a), (b, ids_b))]
        with use(name):
            out = code_cosine(*given, mask_top=mask_top)
            loss = 1.0 - out.mean()
        assert (type(out.grad_fn).__name__ == "_CosineBackward") == (name == "triton")
        found.append([out.detach(), *torch.autograd.grad(loss, (a, b))])
    for got, want in zip(*found[::-1], strict=True):
        torch.testing.assert_close(got, want, rtol=2e-6, atol=1e-7)


def test_no_rows_no_entries_and_too_many(device):
    for n, k in ((0, 3), (4, 0)):
        v = torch.zeros(n, k, device=device)
        with use("triton"):
            assert torch.equal(code_cosine(*[Codes(v, v.long(), 5)] * 2), torch.zeros(n, device=device))
    wide = Codes(*codes(2, pairs.MOST + 1, 600, 0, device), 600)
    with use("triton"):  # compared by a sort, whose comparisons grow more slowly
        torch.testing.assert_close(code_cosine(wide, wide), torch.ones(2, device=device))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("k", [32, 256])
def test_cosines_at_sizes_of_trainings(k):
    test_cosines_and_gradients_are_those_of_float64("cuda", 4096, k, k, 6144)
