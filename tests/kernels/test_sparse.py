"""Sparse products against the dense formula: values, gradients, and that no (N, d_sae) matrix is built."""

import pytest
import torch

from mmsae.kernels import chunked_topk, decode_largest, dense_linear, sampled_linear, sparse_decode
from mmsae.kernels.plain import TorchBackend


def problem(dtype=torch.double, n=6, d=5, f=11, k=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    make = lambda *s: torch.randn(*s, generator=g, dtype=dtype).requires_grad_()  # noqa: E731
    indices = torch.stack([torch.randperm(f, generator=g)[:k] for _ in range(n)])
    return make(n, d), make(f, d), make(f), make(n, k), indices


def test_gradcheck_in_float64():
    x, w, b, v, idx = problem()
    assert torch.autograd.gradcheck(lambda v, w: sparse_decode(v, idx, w), (v, w))
    assert torch.autograd.gradcheck(lambda x, w, b: sampled_linear(x, w, b, idx), (x, w, b))
    scale = torch.rand(11, dtype=torch.double).add(0.5).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w, b, s: sampled_linear(x, w, b, idx, scale=s), (x, w, b, scale))
    assert torch.autograd.gradcheck(lambda x, w, s: sampled_linear(x, w, None, idx, scale=s), (x, w, scale))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.double, 1e-9), (torch.float, 1e-6)])
def test_values_and_gradients_equal_the_dense_formula(dtype, tolerance):
    x, w, b, v, idx = problem(dtype, n=64, d=48, f=200, k=16, seed=1)
    fast = sparse_decode(v * sampled_linear(x, w, b, idx).relu(), idx, w)
    target = torch.randn_like(fast)
    got = torch.autograd.grad((fast - target).square().sum(), (x, w, b, v))
    dense_v = torch.zeros(64, 200, dtype=dtype).scatter(1, idx, v)
    naive = (dense_v * (x @ w.t() + b).relu()) @ w
    want = torch.autograd.grad((naive - target).square().sum(), (x, w, b, v))
    for a, c in zip((fast, *got), (naive, *want), strict=True):
        assert (a - c).norm() / c.norm() < tolerance


def test_latents_nobody_chose_get_zero_gradient():
    x, w, b, _, idx = problem()
    idx = idx.clamp(max=4)
    grad = torch.autograd.grad(sampled_linear(x, w, b, idx).sum(), (w, b))
    assert (grad[0][5:] == 0).all() and (grad[1][5:] == 0).all()


def test_known_values_are_not_computed_again_and_carry_the_same_gradient():
    x, w, b, _, _ = problem()
    values, idx = chunked_topk(x, w, b, 4)
    a = torch.autograd.grad(sampled_linear(x, w, b, idx, values).square().sum(), (x, w, b))
    c = torch.autograd.grad(sampled_linear(x, w, b, idx).square().sum(), (x, w, b))
    for p, q in zip(a, c, strict=True):
        torch.testing.assert_close(p, q)


def test_score_ranks_and_values_stay_signed():
    x, w, b, _, _ = problem(n=9)
    values, idx = chunked_topk(x, w, b, 2, score=lambda u, _: u.abs())
    u = x @ w.t() + b
    assert torch.equal(values, u.gather(1, idx))
    assert torch.equal(idx.sort(1).values, u.abs().topk(2).indices.sort(1).values)


def test_topk_ranks_scaled_and_biased_products():
    x, w, b, _, _ = problem(torch.float, n=9)
    scale = torch.rand(11) + 0.5
    values, idx = chunked_topk(x, w, b, 3, scale=scale)
    want = ((x @ w.t()) * scale + b).topk(3)
    torch.testing.assert_close(values.sort(1).values, want.values.flip(1))
    assert torch.equal(idx.sort(1).values, want.indices.sort(1).values)


def test_no_rows():
    values, idx = chunked_topk(torch.zeros(0, 5), torch.randn(7, 5), None, 3)
    assert values.shape == idx.shape == (0, 3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_equals_cpu():
    x, w, b, v, idx = (t.detach().float() if t.is_floating_point() else t for t in problem(n=300, d=64, f=500, k=8))

    def run(device):
        xs, ws, bs, vs = (t.to(device).requires_grad_() for t in (x, w, b, v))
        i = idx.to(device)
        out = sparse_decode(vs * sampled_linear(xs, ws, bs, i), i, ws)
        return [t.cpu() for t in (out, *torch.autograd.grad(out.square().sum(), (xs, ws, bs, vs)))]

    for a, c in zip(run("cuda"), run("cpu"), strict=True):
        assert (a - c).norm() / c.norm() < 1e-5


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("f", [20, 200], ids=["as a dense matrix", "sparse"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.double, 1e-9), (torch.float, 1e-6)])
def test_the_largest_entries_decode_as_the_dense_formula_does(signed, f, dtype, tolerance):
    g = torch.Generator().manual_seed(f)
    pre, atoms = (torch.randn(*s, generator=g, dtype=dtype).requires_grad_() for s in ((30, f), (f, 12)))
    with torch.no_grad():
        pre[:5] = -pre[:5].abs()  # rows of nothing positive
        pre[5, :7] = 9.0  # equal ones, of which the first k count
    k = 6
    assert TorchBackend().dense_pays(pre.device, f, k) == (f == 20)
    chosen = (pre.abs() if signed else pre).sort(dim=1, descending=True, stable=True).indices[:, :k]
    kept = torch.zeros_like(pre).scatter(1, chosen, 1.0) * (pre if signed else pre.relu())
    target = torch.randn(30, 12, generator=g, dtype=dtype)
    outs = decode_largest(pre, k, atoms, signed), kept @ atoms
    grads = [torch.autograd.grad((out - target).square().sum(), (pre, atoms)) for out in outs]
    rows = slice(None) if f == 20 else torch.arange(30) != 5  # torch does not say which of equal ones it takes
    for a, b in zip((outs[0], grads[0][0]), (outs[1], grads[1][0]), strict=True):
        assert (a[rows] - b[rows]).norm() / b[rows].norm() < tolerance
    if f == 20:
        assert (grads[0][1] - grads[1][1]).norm() / grads[1][1].norm() < tolerance


def test_a_dense_product_has_the_gradients_of_torchs():
    x, w, *_ = problem(torch.float, n=70, d=48, f=90)
    outs = dense_linear(x, w), x.double() @ w.double().t()
    target = torch.randn(70, 90, generator=torch.Generator().manual_seed(2))
    grads = [torch.autograd.grad((out - target).square().sum(), (x, w)) for out in outs]
    for a, b in zip((outs[0], *grads[0]), (outs[1], *grads[1]), strict=True):
        assert (a - b).norm() / b.norm() < 1e-6
