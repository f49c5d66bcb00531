"""One training step of recipes with every backend: equal codes, losses and gradients."""

import copy

import pytest
import torch

from mmsae.kernels import use
from mmsae.sae import LossContext
from tests.helpers.backends import TRITON, place
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
