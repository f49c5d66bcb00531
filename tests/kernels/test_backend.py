"""Every backend against the same oracles: dense formulas in float64, and sorts."""

import gc

import pytest
import torch

from mmsae.kernels import Ranking, backend_for, chunked_above, chunked_topk, raw_product, sampled_linear, use
from mmsae.kernels import sparse_decode as decode
from mmsae.kernels import sparse_scatter as scatter
from tests.helpers.backends import BACKENDS, place


@pytest.fixture(params=BACKENDS)
def on(request):
    """The device of a backend's tensors, while it computes."""
    device = place(request.param)
    with use(request.param):
        assert backend_for(torch.zeros(1, device=device)).name == request.param
        yield device


def normal(*shape, seed=0, device="cpu"):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)


def chosen(n, f, k, device="cpu", hub=None, below=None):
    """``(n, k)`` distinct ids a row, those of ``hub`` in each, none from ``below`` on."""
    scores = torch.rand(n, f, generator=torch.Generator().manual_seed(5))
    if below is not None:
        scores[:, below:] = -1
    if hub is not None:
        scores[:, hub] = 2
    return scores.argsort(dim=1, descending=True)[:, :k].contiguous().to(device)


SIZES = {
    "odd": dict(n=7, d=20, f=27, k=5),
    "one of each row": dict(n=7, d=33, f=11, k=1),
    "one row": dict(n=1, d=5, f=9, k=3),
    "all latents": dict(n=4, d=3, f=6, k=6),
    "many of a row": dict(n=2, d=5, f=260, k=256),
    "a hub": dict(n=261, d=6, f=9, k=2, hub=4),
    "empty latents": dict(n=9, d=16, f=20, k=4, below=8),
}


def step(x, weight, bias, scale, atoms, more, indices, dense=False):
    """A code of chosen entries, decoded, and sums by latent of it; gradients of all that went in."""
    inputs = [x, weight, bias, scale, atoms, more]
    inputs = [t.requires_grad_() for t in inputs]
    x, weight, bias, scale, atoms, more = inputs
    if dense:
        on = torch.zeros(len(x), len(weight), dtype=x.dtype, device=x.device).scatter(1, indices, 1.0)
        code = ((x @ weight.T) * scale + bias).relu() * on
        out, sums = code @ atoms, code.T @ more
    else:
        code = sampled_linear(x, weight, bias, indices, scale=scale).relu()
        out, sums = decode(code, indices, atoms), scatter(code, indices, more, len(weight))
    loss = (out - x).square().sum() + sums.square().sum() / 10
    return [out.detach(), sums.detach(), *torch.autograd.grad(loss, inputs)]


def operands(n, d, f, seed=0):
    shapes = [(n, d), (f, d), (f,), (f,), (f, d), (n, d)]
    x, weight, bias, scale, atoms, more = (normal(*s, seed=seed + i).double() for i, s in enumerate(shapes))
    return x, weight, bias, scale.abs() + 0.5, atoms, more


@pytest.mark.parametrize("case", SIZES)
def test_values_and_gradients_are_those_of_dense_formulas_in_float64(on, case):
    size = SIZES[case]
    indices = chosen(size["n"], size["f"], size["k"], on, size.get("hub"), size.get("below"))
    given = operands(size["n"], size["d"], size["f"])
    want = step(*(t.clone() for t in given), indices.cpu(), dense=True)
    found = step(*(t.float().to(on) for t in given), indices)
    for i, (a, b) in enumerate(zip(found, want, strict=True)):
        assert a.dtype == torch.float32
        assert (a.cpu().double() - b).norm() <= 1e-6 * b.norm(), i
    if "below" in size:
        assert not any(found[i][size["below"] :].any() for i in (1, 3, 4, 6))


def test_operands_need_not_be_contiguous_and_may_have_no_rows(on):
    n, d, f, k = 12, 10, 30, 4
    indices, given = chosen(n, f, k, on), [t.float().to(on) for t in operands(n, d, f)]
    want = step(*(t.clone() for t in given), indices)
    apart = [t.T.contiguous().T if t.dim() == 2 else t.repeat_interleave(2)[::2] for t in given]
    spread = indices.repeat_interleave(2, 1)[:, ::2]
    assert not apart[0].is_contiguous() and not spread.is_contiguous()
    for a, b in zip(step(*apart, spread), want, strict=True):
        torch.testing.assert_close(a, b)
    assert torch.equal(*(chunked_topk(x, given[1], given[2], k)[1].sort(1).values for x in (given[0], apart[0])))

    none = [t[:0] if len(t) == n else t for t in given]
    found = step(*(t.clone() for t in none), indices[:0])
    assert found[0].shape == (0, d) and not any(t.any() for t in found)
    values, ids = chunked_topk(none[0], given[1], given[2], k)
    assert values.shape == ids.shape == (0, k) and ids.dtype == torch.long
    assert backend_for(none[0]).topk(normal(0, f, device=on), k)[1].shape == (0, k)


def distinct(ids, f):
    assert ids.dtype == torch.long and int(ids.min()) >= 0 and int(ids.max()) < f
    assert (ids.sort(1).values.diff(dim=1) > 0).all()
    return ids


RANKINGS = {
    "value": None,
    "abs": dict(absolute=True),
    "factor": dict(factor=True),
    "both": dict(absolute=True, factor=True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("ranking", RANKINGS)
@pytest.mark.parametrize(("n", "f", "k"), [(3, 97, 1), (2, 97, 97), (2, 600, 256), (3, 1030, 7)])
def test_topk_is_that_of_torch_apart_from_ties(on, dtype, ranking, n, f, k):
    matrix, options = normal(n, f, seed=f, device=on).to(dtype), RANKINGS[ranking]
    if options and options.get("factor"):
        options = {**options, "factor": normal(f, seed=1, device=on).abs() + 0.1}
    by = None if options is None else Ranking(**options)
    values, ids = backend_for(matrix).topk(matrix, k, by)
    assert torch.equal(values, matrix.gather(1, distinct(ids, f))) and values.dtype == dtype
    ranked = matrix if by is None else by(matrix)
    assert torch.equal(ranked.gather(1, ids).sort(1).values, ranked.topk(k).values.sort(1).values)


def test_ties_and_rows_with_few_positive_entries(on):
    matrix = torch.zeros(6, 70, device=on)
    matrix[1, ::2] = 1.0
    matrix[2] = -1.0
    matrix[3, 5] = 2.0
    matrix[4] = torch.arange(70.0) // 10
    matrix[5, 3:5] = torch.tensor([0.0, -0.0])
    values, ids = backend_for(matrix).topk(matrix, 8)
    distinct(ids, 70)
    assert torch.equal(values.sort(1).values, matrix.topk(8).values.sort(1).values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("budget", [1, 40, 700, 10**6])
def test_the_threshold_of_a_budget_and_what_is_above_one(on, dtype, budget):
    scores = normal(9, 150, seed=3, device=on).to(dtype)
    backend = backend_for(scores)
    least = backend.threshold(scores, budget)
    positive = scores[scores > 0].float().sort(descending=True).values
    assert least.dim() == 0 and least.dtype == dtype and least == positive[:budget][-1]
    ids, kept = backend.above(scores, least, inclusive=True)
    want = scores >= least
    assert torch.equal(torch.zeros_like(want).scatter(1, distinct(ids, 150), kept), want)
    assert ids.shape[1] == int(want.sum(1).max()) and int(want.sum()) >= min(budget, len(positive))
    per_latent = normal(150, seed=4, device=on).abs()
    ids, kept = backend.above(scores, per_latent, 5)
    want = scores.float() > per_latent
    assert torch.equal(torch.zeros_like(want).scatter(1, distinct(ids, 150), kept), want)
    assert ids.shape[1] == max(5, int(want.sum(1).max()))


def test_where_nothing_is_positive_nothing_is_kept(on):
    for scores in (-normal(4, 20, device=on).abs(), torch.zeros(4, 20, device=on), torch.zeros(0, 20, device=on)):
        backend = backend_for(scores)
        least = backend.threshold(scores, 7)
        assert least == torch.inf
        ids, kept = backend.above(scores, least, inclusive=True)
        assert ids.shape == kept.shape == (len(scores), 1) and not kept.any()


def test_groups_have_their_largest_entry(on):
    matrix = normal(5, 63, device=on)
    ids = backend_for(matrix).group_max(matrix, 9)
    assert torch.equal(matrix.gather(1, ids), matrix.unflatten(1, (9, 7)).amax(2)) and distinct(ids, 63).shape == (5, 9)


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("by", ["value", "abs", "norm", "any"])
def test_what_is_chosen_of_a_product_has_the_values_of_float32(on, scale, bias, precision, by):
    n, d, f, k = 11, 24, 83, 6
    x, weight, b, s, *_ = (t.float().to(on) for t in operands(n, d, f))
    b, s = b if bias else None, s if scale else None
    score = {
        "value": None,
        "abs": Ranking(absolute=True),
        "norm": Ranking(factor=weight.norm(dim=1)),
        "any": lambda u, rows: u.sin() + x[rows, :1],
    }[by]
    product = raw_product(x, weight, b, s, precision).float()
    ranked = product if score is None else score(product, slice(0, n))
    exact = x @ weight.T
    exact = exact if s is None else exact * s
    exact = exact if b is None else exact + b
    assert (product - exact).norm() / exact.norm() < (1e-6 if precision == "fp32" else 1e-2)
    values, ids = chunked_topk(x, weight, b, k, score, s, precision)
    torch.testing.assert_close(values, exact.gather(1, distinct(ids, f)), rtol=2e-6, atol=2e-6)
    least = ranked.gather(1, ids).amin(1)
    others = ranked.scatter(1, ids, -torch.inf).amax(1)
    slack = 1e-6 if precision == "fp32" else 2**-7  # factors are taken before or after the product is rounded
    assert (least >= others - slack * others.abs()).all()
    threshold = ranked.flatten().sort().values[-100]
    values, ids, kept = chunked_above(x, weight, b, threshold, score, s, precision)
    torch.testing.assert_close(values, exact.gather(1, distinct(ids, f)), rtol=2e-6, atol=2e-6)
    off = (torch.zeros_like(ranked, dtype=torch.bool).scatter(1, ids, kept) != (ranked > threshold)) & (
        (ranked - threshold).abs() > slack * threshold.abs()
    )
    assert not off.any()


def test_double_precision_is_left_to_torch(on):
    x = torch.zeros(2, 3, dtype=torch.double, device=on)
    assert backend_for(x).name != "triton"


def test_a_step_sorts_once_and_keeps_nothing(on, monkeypatch):
    backend = backend_for(torch.zeros(1, device=on))
    if backend.name == "reference":
        pytest.skip("it sorts nothing")
    sorts, segments = [], backend.segments
    monkeypatch.setattr(backend, "segments", lambda *given: sorts.append(1) or segments(*given))
    before, given = len(backend._sorted), [t.float().to(on) for t in operands(9, 8, 20)]
    runs = []
    for steps in (1, 2):
        indices = chosen(9, 20, 3, on)
        runs.append(step(*(t.clone() for t in given), indices))
        assert len(sorts) == steps  # for sums, and gradients of atoms, of the encoder's rows and of its scale
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    indices.copy_(chosen(9, 20, 3, on, below=5))
    again = step(*(t.clone() for t in given), indices)
    assert len(sorts) == 3 and not torch.equal(runs[0][4], again[4])  # the tensor was written to
    del indices
    gc.collect()
    assert len(backend._sorted) <= before


def test_known_values_are_taken_as_they_are(on):
    x, weight, bias, *_ = (t.float().to(on) for t in operands(5, 6, 9))
    values, ids = chunked_topk(x, weight, bias, 2)
    with torch.no_grad():
        assert torch.equal(sampled_linear(x, weight, bias, ids, values), values)
    x.requires_grad_()
    known, anew = (
        torch.autograd.grad(sampled_linear(x, weight, bias, ids, v).square().sum(), x) for v in (values, None)
    )
    torch.testing.assert_close(known[0], anew[0])
