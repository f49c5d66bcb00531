"""Behind the screen of a bfloat16 product the same latents are chosen as without it, and as in float64."""

import pytest
import torch

from mmsae import SAE
from mmsae.kernels import chunked_above, chunked_largest, chunked_topk, screen
from mmsae.kernels.backend import Ranking
from mmsae.kernels.choice import backend_for
from mmsae.kernels.screen import Screen
from mmsae.sae import BatchTopK, TopK

N, D, F, K = 520, 48, 2048, 16  # two chunks and a part of one


@pytest.fixture(autouse=True)
def _bfloat16_is_native(monkeypatch):
    """The same on every processor; elsewhere it is slow, and these are small."""
    monkeypatch.setattr(screen, "NATIVE_BF16", True)
    monkeypatch.setattr(screen, "WIDTH", F)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def operands(kind: str) -> dict:
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(N, D, generator=g), torch.randn(F, D, generator=g) / D**0.5
    b = torch.randn(F, generator=g) * 0.1
    scale = torch.rand(F, generator=g) + 0.5
    if kind == "no bias":
        return {"x": x, "weight": w, "bias": None}
    if kind == "scale":
        return {"x": x, "weight": w, "bias": b, "scale": scale}
    if kind == "large bias":
        return {"x": x, "weight": w, "bias": b * 100}
    if kind == "a coordinate far above the others":
        x[:, 3] = 300.0
        w[:, 3] = 0.001
    if kind == "small and large":
        return {"x": x * 1e-12, "weight": w * 1e20, "bias": None}
    if kind == "norms that differ":
        w *= torch.logspace(-2, 2, F)[torch.randperm(F, generator=g), None]
    if kind == "few positive":
        b = b - 2.5
    if kind == "latents twice":
        w[F // 2 :], b[F // 2 :] = w[: F // 2], b[: F // 2]
    if kind == "rows of zeros":
        x[::7] = 0.0
        b = b * 0
    if kind == "a row that is not finite":
        x[5, 2], x[300, 0] = torch.nan, torch.inf
    if kind == "a weight that is not finite":
        w[7, 7] = torch.nan
    return {"x": x, "weight": w, "bias": b}


KINDS = [
    "normal",
    "no bias",
    "scale",
    "large bias",
    "a coordinate far above the others",
    "small and large",
    "norms that differ",
    "few positive",
    "latents twice",
    "rows of zeros",
    "a row that is not finite",
    "a weight that is not finite",
]
RANKINGS = [None, Ranking(), Ranking(absolute=True), Ranking(factor=torch.linspace(0.5, 2, F))]


def truth(of: dict, ranking: Ranking | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Entries and scores in float64."""
    x, w, b = of["x"].double(), of["weight"].double(), of["bias"]
    u = x @ w.T * of.get("scale", torch.ones(F)).double()
    u = u if b is None else u + b.double()
    if ranking is None:
        return u, u
    return u, Ranking(ranking.absolute, None if ranking.factor is None else ranking.factor.double())(u)


def without(monkeypatch, call, *args, **kwargs):
    with monkeypatch.context() as m:
        m.setattr(screen, "NATIVE_BF16", False)
        return call(*args, **kwargs)


@pytest.mark.parametrize("ranking", RANKINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_no_rounded_score_is_farther_off_than_is_said(kind, ranking):
    of = operands(kind)
    s = Screen(of["x"], of["weight"], of["bias"], of.get("scale"), ranking)
    scores = truth(of, ranking)[1]
    finite = torch.isfinite(scores) & torch.isfinite(torch.from_numpy(s._error))[:, None]
    for rows in s.chunks:
        rounded = torch.from_numpy(s._keys(rows)).view(torch.bfloat16).double()
        error = torch.from_numpy(s._error[rows]).double()[:, None]
        off = (rounded - scores[rows]).abs()
        assert (off <= error + screen.ROUNDING * rounded.abs())[finite[rows]].all()
        # and the bound is no larger than ten times what occurs
        if kind in ("normal", "no bias") and ranking is None:
            assert off.max() > 0.1 * error.min()


@pytest.mark.parametrize("ranking", RANKINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_k_largest_are_those_of_the_whole_product(kind, ranking, monkeypatch):
    of = operands(kind)
    assert screen.screen_pays(backend_for(of["x"]), of["x"], of["weight"], K, ranking)
    values, ids = chunked_topk(**of, k=K, score=ranking)
    plain = without(monkeypatch, chunked_topk, **of, k=K, score=ranking)
    assert (ids.sort(1).values.diff(dim=1) > 0).all() and ids.min() >= 0 and ids.max() < F
    u, scores = truth(of, ranking)
    fine = torch.isfinite(scores).all(1)
    chosen = scores.gather(1, ids)[fine].sort(1).values
    best = scores[fine].topk(K).values.flip(1)
    size = scores[fine].abs().amax(1, keepdim=True) if fine.any() else 1.0
    assert ((chosen - best).abs() <= 3e-6 * size).all()  # what is as large to the precision of sums in float32
    assert ((values - u.gather(1, ids))[fine].abs() <= 3e-6 * u.abs().amax(1, keepdim=True)[fine]).all()
    assert torch.equal(ids[~fine], plain[1][~fine])
    assert (ids == plain[1]).float().mean() > 0.999
    torch.testing.assert_close(
        values, plain[0], rtol=1e-4, atol=float(plain[0].nan_to_num(0, 0, 0).abs().max()) * 1e-6, equal_nan=True
    )


def test_of_latents_that_are_equal_the_first_are_chosen():
    ids = chunked_topk(**operands("latents twice"), k=K - 1)[1]
    assert ((ids < F // 2).sum(1) == K // 2).all()


@pytest.mark.parametrize("ranking", [Ranking(), Ranking(absolute=True), Ranking(factor=torch.linspace(0.5, 2, F))])
@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_above_a_threshold(kind, each, ranking, monkeypatch):
    of = operands(kind)
    size = truth(of, ranking)[1].nan_to_num(0, 0, 0).abs().max().float()
    threshold = size * (torch.linspace(0.5, 1, F) if each else 0.5)
    got = chunked_above(**of, threshold=threshold, score=ranking)
    want = without(monkeypatch, chunked_above, **of, threshold=threshold, score=ranking)
    dense = lambda values, ids, on: torch.zeros(N, F).scatter(1, ids, torch.where(on, values, 0.0))  # noqa: E731
    torch.testing.assert_close(dense(*got), dense(*want), rtol=1e-4, atol=float(size) * 1e-6, equal_nan=True)
    assert got[1].shape == want[1].shape and torch.equal(got[2].sum(1), want[2].sum(1))
    assert (got[1].sort(1).values.diff(dim=1) > 0).all()


@pytest.mark.parametrize("budget", [1, N * K, N * F])
@pytest.mark.parametrize("kind", KINDS)
def test_the_largest_of_a_batch(kind, budget, monkeypatch):
    of = operands(kind)
    got = chunked_largest(**of, budget=budget, score=Ranking())
    want = without(monkeypatch, chunked_largest, **of, budget=budget, score=Ranking())
    assert got.kept.sum() == want.kept.sum() and got.values.dtype == want.values.dtype
    dense = lambda f: torch.zeros(N, F).scatter(1, f.indices, torch.where(f.kept, f.values, 0.0))  # noqa: E731
    size = float(dense(want).nan_to_num(0, 0, 0).abs().max())
    torch.testing.assert_close(dense(got), dense(want), rtol=1e-4, atol=size * 1e-6, equal_nan=True)
    torch.testing.assert_close(got.least, want.least, rtol=1e-4, atol=size * 1e-6)


def test_an_early_part_of_small_rows_does_not_lower_what_a_batch_keeps(monkeypatch):
    of = operands("normal")
    of["x"] = of["x"] * torch.linspace(0.2, 3, N)[:, None]
    for x in (of["x"], of["x"].flip(0)):
        got = chunked_largest(**of | {"x": x}, budget=N * 4, score=Ranking())
        want = without(monkeypatch, chunked_largest, **of | {"x": x}, budget=N * 4, score=Ranking())
        assert torch.equal(got.indices[got.kept], want.indices[want.kept])


def test_where_the_bound_says_nothing_the_product_is_made_in_float32_but_once(monkeypatch):
    of = operands("a coordinate far above the others")
    rows = []
    monkeypatch.setattr(Screen, "_keys", lambda self, part, known=Screen._keys: rows.append(part) or known(self, part))
    chunked_topk(**of, k=K)
    assert rows == [slice(0, 256)]


@pytest.mark.parametrize(
    ("change", "k"),
    [
        ({}, F // 32),
        ({"x": torch.randn(screen.ROWS - 1, D)}, K),
        ({"x": torch.randn(N, D).double(), "weight": torch.randn(F, D).double()}, K),
        ({"weight": torch.randn(F - 1, D)}, 4),
    ],
)
def test_it_is_left_out_where_it_does_not_pay(change, k):
    of = operands("normal") | change
    assert not screen.screen_pays(backend_for(of["x"]), of["x"], of["weight"], k, None)
    assert not screen.screen_pays(backend_for(of["x"]), of["x"], of["weight"], 1, lambda u, rows: u)


@pytest.mark.parametrize("selector", [TopK(K), TopK(K, score="abs"), TopK(K, score="norm"), BatchTopK(K)])
def test_codes_and_gradients_of_an_sae(selector, monkeypatch):
    torch.manual_seed(0)
    sae = SAE(D, F, modalities=["image"], selector=selector).train()
    x = torch.randn(N, D)

    def step():
        out = sae({"image": x})["image"]
        loss = (out.x_hat - x).square().sum()
        return [out.x_hat, *torch.autograd.grad(loss, [p for p in sae.parameters() if p.requires_grad])]

    for got, want in zip(step(), without(monkeypatch, step), strict=True):
        assert (got - want).norm() <= 1e-5 * want.norm()


def test_a_step_repeats_its_bits():
    of = operands("normal")
    for one, other in zip(chunked_topk(**of, k=K), chunked_topk(**of, k=K), strict=True):
        assert torch.equal(one, other)


def test_fewer_than_twice_as_many_as_are_chosen_are_computed_in_float32():
    """Of normal operands of a usual size, as docs/reasons.md says."""
    torch.manual_seed(0)
    x, w = torch.randn(256, 512), torch.randn(8192, 512) / 512**0.5
    places, odd = Screen(x, w, torch.zeros(8192), None, None)._may_be_largest(slice(0, 256), 32)
    assert not odd.any() and round(len(places) / 256) == 56
