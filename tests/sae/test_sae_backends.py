"""One training step of recipes with every backend: equal codes, losses and gradients."""

import copy

import pytest
import torch

from mmsae.kernels import use
from mmsae.sae import SAE, LossContext, TopK
from tests.helpers.backends import BACKENDS, TRITON, place
from tests.helpers.recipes import ROOT, SAE_RECIPES, Run, batch, small_model

SMALL = dict(d_in=8, d_sae=24, k=3)
FAMILIES = (
    "topk vl_sae paired_topk shared_topk dual_topk batch_topk abs_topk matryoshka msae group_max feature_choice sparc"
)


def started(path, precision=None, **sizes):
    torch.manual_seed(0)
    sae, losses = small_model(path, **sizes)
    sae.precision = precision
    sae.fit_normaliser(batch(sae, 256, seed=10_000).x)
    run = Run(sae, losses)
    run.go(3)
    run.usage.since[:, ::3] = 10**9
    return run


def step(run, name, rows, training=True):
    """``({what: tensor of a step}, gradients)``, on the CPU."""
    run, device = copy.deepcopy(run), place(name)
    sae, losses = run.sae.to(device).train(training), run.losses.to(device)
    tokens = batch(sae, rows, seed=77)
    tokens = tokens._replace(**{f: {m: x.to(device) for m, x in getattr(tokens, f).items()} for f in ("x", "grad")})
    torch.manual_seed(3)
    with use(name):
        out = sae(tokens)
        loss = sum(term(out, LossContext(sae, run.usage.to(device), 0.5, run.step)) for term in losses)
        weights = [p for p in sae.parameters() if p.requires_grad] if loss.requires_grad else []
        grads = torch.autograd.grad(loss, weights, allow_unused=True) if weights else []
    found = {"loss": loss.detach()} | {f"codes of {m}": o.codes.to_dense().detach() for m, o in out.items()}
    found |= {f"x_hat of {m}": o.x_hat.detach() for m, o in out.items()}
    found |= {f"state {n}": b for n, b in sae.named_buffers() if b.is_floating_point()}
    return {n: t.cpu() for n, t in found.items()}, [None if g is None else g.cpu() for g in grads]


def compare(run, names, rows, training=True):
    (want, gradients), *others = (step(run, name, rows, training) for name in names)
    for found, other in others:
        for name, value in want.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=2e-6, msg=lambda s, n=name: f"{n}: {s}")
        for a, b in zip(other, gradients, strict=True):
            assert (a is None) == (b is None)
            assert a is None or (a - b).norm() <= 3e-6 * b.norm() + 1e-9


@pytest.mark.parametrize("path", SAE_RECIPES, ids=lambda p: p.stem)
def test_torch_steps_as_the_reference_does(path):
    compare(started(path, d_in=16, d_sae=48, k=4), ("reference", "torch"), 33)


@pytest.mark.parametrize("backend", [TRITON])
@pytest.mark.parametrize("name", FAMILIES.split())
def test_triton_steps_as_the_reference_does(name, backend):
    compare(started(ROOT / "configs" / "sae" / f"{name}.yaml", **SMALL), ("reference", backend), 9)


@pytest.mark.parametrize("backend", [TRITON])
@pytest.mark.parametrize("name", ["vl_sae", "batch_topk", "jumprelu"])
def test_triton_codes_as_the_reference_does_after_training(name, backend):
    compare(started(ROOT / "configs" / "sae" / f"{name}.yaml", **SMALL), ("reference", backend), 9, training=False)


@pytest.mark.parametrize("backend", ["torch", TRITON])
@pytest.mark.parametrize("name", ["topk", "vl_sae", "batch_topk", "group_max"])
def test_bf16_steps_with_float32_gradients_of_what_it_chose(name, backend):
    run = started(ROOT / "configs" / "sae" / f"{name}.yaml", "bf16", **SMALL)
    run.losses = torch.nn.ModuleList([run.losses[0]])  # what AuxK takes of dead latents is of the product itself
    found, gradients = step(run, backend, 9)
    run.sae.precision = "fp32"
    want, others = step(run, "reference", 9)
    chosen = [n for n in want if n.startswith("codes")]
    if all(torch.equal(found[n] != 0, want[n] != 0) for n in chosen):
        for a, b in zip(gradients, others, strict=True):
            assert (a - b).norm() <= 1e-5 * b.norm()
    for n in chosen:
        both = (found[n] != 0) & (want[n] != 0)
        assert both.sum() >= 0.9 * (want[n] != 0).sum()
        torch.testing.assert_close(found[n][both], want[n][both], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", [TRITON])
def test_modalities_with_one_encoder_are_coded_in_one_pass(backend, monkeypatch):
    from mmsae.kernels.triton import select

    calls, topk = [], select.topk
    monkeypatch.setattr(select, "topk", lambda matrix, *given: calls.append(len(matrix)) or topk(matrix, *given))
    for name, rows in (("paired_topk", [18]), ("vl_sae", [18]), ("dual_topk", [9, 9])):
        run = started(ROOT / "configs" / "sae" / f"{name}.yaml", **SMALL)
        run.usage.since.zero_()  # AuxK has none to choose from
        calls.clear()
        step(run, backend, 9)
        assert calls == rows


@pytest.mark.parametrize("backend", [TRITON])
@pytest.mark.parametrize("name", ["paired_topk", "shared_topk", "dual_topk"])
def test_dead_latents_of_modalities_with_one_encoder_are_coded_in_one_pass(name, backend, monkeypatch):
    """Each modality alone (as where their numbers of rows differ) gives the same loss and gradients."""
    from mmsae.sae import AuxK, losses

    run = started(ROOT / "configs" / "sae" / f"{name}.yaml", **SMALL)
    run.losses = torch.nn.ModuleList([term for term in run.losses if isinstance(term, AuxK)])
    decoded, found, each = [], [], losses.decode_largest_each
    monkeypatch.setattr(
        losses, "decode_largest_each", lambda pre, *given: decoded.append(len(pre)) or each(pre, *given)
    )
    columns = losses.columns_below
    for alone in (False, True):
        if alone:
            monkeypatch.setattr(losses, "columns_below", lambda p, ids: columns(p, ids) if len(p) == 1 else None)
        found.append(step(run, backend, 9))
    assert decoded == ([9, 9, 9, 9] if name == "dual_topk" else [18, 9, 9])
    assert found[0][0]["loss"] > 0
    torch.testing.assert_close(found[0][0]["loss"], found[1][0]["loss"], rtol=1e-6, atol=0)
    for a, b in zip(*(grads for _, grads in found), strict=True):
        assert (a is None) == (b is None)
        assert a is None or (a - b).norm() <= 2e-6 * b.norm()


# of TopK: rows, width, latents, k, and what is special
AWKWARD = {
    "ties": (7, 12, 20, 5),
    "few positive": (7, 12, 30, 6),
    "k 1": (5, 7, 33, 1),
    "k 256": (2, 9, 300, 256),
    "k all": (3, 5, 11, 11),
    "powers of two": (8, 16, 64, 4),
    "a hub": (131, 6, 21, 2),
    "empty latents": (9, 10, 40, 3),
    "rows of zeros": (9, 10, 40, 3),
    "not contiguous": (9, 10, 40, 3),
}


def awkward(case):
    """An SAE and rows that are so."""
    n, d, d_sae, k = AWKWARD[case]
    torch.manual_seed(5)
    sae = SAE(d, d_sae, modalities=["image"], selector=TopK(k)).train()
    x = torch.randn(n, d)
    with torch.no_grad():
        sae.encoder.weight.add_(torch.randn(d_sae, d), alpha=0.3)  # tied, errors of values would cancel
        sae.encoder.bias.normal_(std=0.1)
        sae.dictionary("image").bias.normal_(std=0.1)
        if case == "ties":  # of every four latents all are alike
            sae.encoder.weight.copy_(sae.encoder.weight[::4].repeat_interleave(4, 0))
            sae.encoder.bias.copy_(sae.encoder.bias[::4].repeat_interleave(4))
        if case == "few positive":
            sae.encoder.bias.sub_(1.2)
        if case == "a hub":
            sae.encoder.bias[4] = 10.0
        if case == "empty latents":
            sae.encoder.bias[8:] = -100.0
        if case == "rows of zeros":
            x[::3] = 0
        if case == "not contiguous":
            x = x.repeat(1, 2).t().contiguous().t()[:, ::2]
    return sae, x


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("case", AWKWARD)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_a_step_are_those_of_float64_where_it_is_awkward(backend, case, precision):
    """Of what was chosen, by the precision of the product; then 1e-6, whatever that is, and the same in every run."""
    device, (sae, x) = place(backend), awkward(case)
    sae, x, k = sae.to(device), x.to(device), sae.selector.k
    sae.precision = precision
    weights, runs = list(sae.parameters()), []
    with use(backend):
        for _ in range(2):
            out = sae({"image": x})["image"]
            loss = (out.x_hat - x).square().sum()
            runs.append([out.codes.to_dense().detach(), *torch.autograd.grad(loss, weights)])
    if backend != "torch" or device == "cpu":
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))

    exact = [p.detach().double().requires_grad_() for p in weights]
    w, b, atoms, centre = (exact[[id(p) for p in weights].index(id(q))] for q in _of(sae))
    u = (x.double() - centre) @ w.T + b
    ids = out.codes.indices
    assert ids.shape == (len(x), k) and (ids.sort(1).values.diff(dim=1) > 0).all()
    z = u.relu() * torch.zeros_like(u).scatter(1, ids, 1.0)
    want = torch.autograd.grad((z @ atoms + centre - x).square().sum(), exact)
    for got, value in zip(runs[0], (z.detach(), *want), strict=True):
        assert got.dtype == torch.float32
        assert (got.double() - value).norm() <= 1e-6 * value.norm()
    if precision == "fp32":  # the same set as torch's, apart from ties
        best = u.detach().topk(k).values
        torch.testing.assert_close(u.detach().gather(1, ids).sort(1).values, best.sort(1).values, rtol=0, atol=1e-5)
    counts = (out.codes.to_dense() != 0).sum(0)
    if case == "few positive":
        assert ((z > 0).sum(1) < k).any() and (z > 0).any()
    if case == "a hub":
        assert counts[4] == len(x)
    if case == "empty latents":
        assert not counts[8:].any() and not runs[0][1 + [id(p) for p in weights].index(id(sae.encoder.bias))][8:].any()


def _of(sae):
    dictionary = sae.dictionary("image")
    return sae.encoder.weight, sae.encoder.bias, dictionary.weight, dictionary.bias
