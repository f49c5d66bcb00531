import pytest
import torch

from mmsae import SAE, InputError
from mmsae.sae import Dictionary, PreCodes, SelectContext, TopK


def pre_of(u):
    """PreCodes whose dense form is ``u``."""
    return PreCodes(u, torch.eye(u.shape[1]), None)


def rows_of(x):
    return SelectContext("image", Dictionary(), x)


def dense(selector, u):
    values, indices = selector(pre_of(u), rows_of(u))
    return torch.zeros_like(u).scatter(1, indices, values)


def test_ties_at_the_boundary():
    tied, free = torch.tensor([[0.9, 0.8, 0.8, 0.1]]), torch.tensor([[0.9, 0.8, 0.7, 0.1]])
    assert (dense(TopK(2), tied) != 0).sum() == 2 and (dense(TopK(2, strict=True), tied) != 0).sum() == 1
    for strict in (False, True):
        assert torch.equal(dense(TopK(2, strict=strict), free), torch.tensor([[0.9, 0.8, 0, 0]]))


def test_strict_is_the_published_kthvalue_rule():
    torch.manual_seed(0)
    u = torch.rand(50, 40).mul(20).round().div(20)  # many ties
    for k in (1, 5, 39):
        threshold = u.abs().kthvalue(40 - k, dim=1, keepdim=True).values
        assert torch.equal(dense(TopK(k, strict=True), u), torch.where(u.abs() > threshold, u, 0))


def test_l0_is_k_with_enough_positives_and_less_without():
    torch.manual_seed(1)
    assert ((dense(TopK(6), torch.rand(9, 30) + 0.1) != 0).sum(1) == 6).all()
    u = torch.full((1, 8), -1.0)
    u[0, 3] = 2.0
    assert dense(TopK(4), u).tolist() == [[0, 0, 0, 2, 0, 0, 0, 0]]


def test_equals_the_dense_formula_over_many_row_chunks():
    torch.manual_seed(2)
    x, w, b = torch.randn(700, 12), torch.randn(50, 12), torch.randn(50)
    values, indices = TopK(7)(PreCodes(x, w, b), rows_of(x))
    u = x @ w.t() + b
    top = u.topk(7)
    want = torch.zeros_like(u).scatter(1, top.indices, top.values.relu())
    torch.testing.assert_close(torch.zeros_like(u).scatter(1, indices, values), want)


def test_abs_topk_is_odd_and_no_sparse_code_is_nearer():
    """Section 7 of sae_variants: odd symmetry, optimality and the non-negative case, all exact."""
    u = torch.randn(40, 30, generator=torch.Generator().manual_seed(3))
    signed = TopK(6, score="abs")
    z = dense(signed, u)
    assert torch.equal(dense(signed, -u), -z) and (z < 0).any()
    errors = [(u - dense(selector, u)).square().sum(1) for selector in (signed, TopK(6))]
    assert (errors[0] <= errors[1]).all() and (errors[0] < errors[1]).any()
    discarded = u.abs().sort(dim=1).values[:, :-6].square().sum(1)
    torch.testing.assert_close(errors[0], discarded)  # no 6-sparse code is nearer
    assert torch.equal(dense(signed, u.abs()), dense(TopK(6), u.abs()))


def test_k_is_checked_and_survives_a_state_dict():
    with pytest.raises(InputError, match="strict needs"):
        SAE(4, 8, selector=TopK(8, strict=True))
    a, b = TopK(5), TopK(3)
    a.set_k(2)
    b.load_state_dict(a.state_dict())
    assert b.k == 2
