import pytest
import torch

from mmsae.kernels.pairs import code_cosine, code_dot, mask_tops, paired_dot
from mmsae.types import Codes, RowInfo


def sparse(n, k, d, seed, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    idx = torch.rand(n, d, generator=g).argsort(1)[:, :k]
    return torch.rand(n, k, generator=g, dtype=dtype), idx


def dense(v, i, d):
    return v.new_zeros(len(v), d).scatter(1, i, v)


@pytest.mark.parametrize("ka,kb", [(1, 1), (3, 5), (6, 6)])
@pytest.mark.parametrize("weighted", [False, True])
def test_equals_dense(ka, kb, weighted):
    va, ia = sparse(40, ka, 9, 0)
    vb, ib = sparse(40, kb, 9, 1)
    w = torch.linspace(0, 2, 9, dtype=torch.float64) if weighted else None
    want = (dense(va, ia, 9) * dense(vb, ib, 9) * (1 if w is None else w)).sum(1)
    torch.testing.assert_close(paired_dot(va, ia, vb, ib, w), want, rtol=1e-12, atol=1e-12)


def test_gradcheck_to_second_order_against_dense():
    va, ia = sparse(5, 3, 7, 2)
    vb, ib = sparse(5, 4, 7, 3)
    w = torch.rand(7, dtype=torch.float64, requires_grad=True)
    va.requires_grad_()
    vb.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b, w: paired_dot(a, ia, b, ib, w), (va, vb, w))
    assert torch.autograd.gradgradcheck(lambda a, b: paired_dot(a, ia, b, ib), (va, vb))
    up = torch.rand(5, dtype=torch.float64)
    got = torch.autograd.grad(paired_dot(va, ia, vb, ib), (va, vb), up)
    want = torch.autograd.grad((dense(va, ia, 7) * dense(vb, ib, 7)).sum(1), (va, vb), up)
    for g, t in zip(got, want, strict=True):
        torch.testing.assert_close(g, t, rtol=1e-9, atol=1e-12)


def test_disjoint_and_empty_supports_give_zero():
    v = torch.ones(2, 2)
    a, b = torch.tensor([[0, 1], [2, 3]]), torch.tensor([[2, 3], [0, 1]])
    assert paired_dot(v, a, v, b).tolist() == [0, 0]
    empty = torch.empty(2, 0)
    assert paired_dot(v, a, empty, empty.long()).tolist() == [0, 0]


def from_dense(rows, as_sparse):
    x = torch.tensor(rows, dtype=torch.float64)
    if not as_sparse:
        return Codes(x, None, x.shape[1])
    v, i = x.topk(x.shape[1], dim=1)
    return Codes(v, i, x.shape[1])


@pytest.mark.parametrize("sa", [False, True])
@pytest.mark.parametrize("sb", [False, True])
def test_masked_cosine_example(sa, sb):
    """spec/multimodal_saes.md section 2: plain .714, masked .200; and the hub example .990."""
    z, w = from_dense([[3, 2, 0, 1]], sa), from_dense([[3, 0, 2, 1]], sb)
    assert code_cosine(z, w).item() == pytest.approx(10 / 14)
    assert code_cosine(z, w, mask_top=1).item() == pytest.approx(0.2)
    hub = code_cosine(from_dense([[10, 1, 0]], sa), from_dense([[10, 0, 1]], sb))
    assert hub.item() == pytest.approx(100 / 101)


@pytest.mark.parametrize("sb", [False, True])
def test_weighted_cosine_is_the_cosine_under_the_weighted_product(sb):
    g = torch.Generator().manual_seed(0)
    x, y, w = (torch.rand(s, generator=g, dtype=torch.float64) for s in ((20, 6), (20, 6), (6,)))
    want = torch.cosine_similarity(x * w.sqrt(), y * w.sqrt())
    got = code_cosine(from_dense(x.tolist(), True), from_dense(y.tolist(), sb), weights=w)
    torch.testing.assert_close(got, want)


def test_mask_tops_of_signed_codes_are_the_largest_sizes():
    a, b = mask_tops(from_dense([[1, -5, 2, 3]], True), from_dense([[1, 2, 0, -3]], False), n=1)
    assert a.to_dense().tolist() == [[1, 0, 2, 0]] and b.to_dense().tolist() == [[1, 0, 0, 0]]


def test_mask_tops_removes_the_top_of_either_row_from_both():
    a, b = mask_tops(from_dense([[5, 1, 2, 3]], True), from_dense([[1, 5, 2, 3]], False), n=1)
    assert a.to_dense().tolist() == [[0, 0, 2, 3]] and b.to_dense().tolist() == [[0, 0, 2, 3]]


def test_zero_rows_have_zero_cosine_and_finite_gradients():
    v = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    i = torch.arange(3).expand(2, 3)
    cos = code_cosine(Codes(v, i, 3), Codes(torch.ones_like(v), i, 3))
    cos.sum().backward()
    assert cos.tolist() == [0, 0] and torch.isfinite(v.grad).all()


def test_codes_below_each_other_have_distinct_latents_in_each_row_by_hand():
    narrow = Codes(torch.tensor([[3.0], [5.0]]), torch.tensor([[0], [2]]), 6)
    wide = Codes(torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[5, 0, 1]]), 6)
    both = Codes.stack([narrow, wide])
    assert both.values.tolist() == [[3, 0, 0], [5, 0, 0], [1, 2, 4]]
    assert both.indices.tolist() == [[0, 1, 2], [2, 0, 1], [5, 0, 1]]
    other = Codes(torch.tensor([[2.0], [7.0], [10.0]]), torch.zeros(3, 1, dtype=torch.long), 6)
    for a, b in ((both, other), (other, both)):  # 3 * 2: the product of a true latent 0, which a filling with 0 lost
        assert code_dot(a, b).tolist() == [6, 0, 20]
    assert torch.equal(both.to_dense(), torch.cat([narrow.to_dense(), wide.to_dense()]))
    full = Codes(torch.ones(1, 4), torch.tensor([[3, 1, 0, 2]]), 4)
    last = Codes(torch.ones(1, 2), torch.tensor([[3, 0]]), 4)
    assert Codes.stack([last, full]).indices.tolist() == [[3, 0, 1, 2], [3, 1, 0, 2]]


def test_dense_codes_below_each_other_keep_the_scale_of_each_row():
    parts = [
        Codes(torch.full((n, 4), float(n)), None, 4, "image", RowInfo(torch.full((n, 1), 2.0 * n))) for n in (1, 2)
    ]
    both = Codes.stack(parts)
    assert both.values[:, 0].tolist() == [1, 2, 2] and both.info.outer[:, 0].tolist() == [2, 4, 4]
    assert both.info.inner is None and Codes.stack([parts[0], parts[1]._replace(info=None)]).info is None
