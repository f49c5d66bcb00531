"""What holds for every SAE of the literature, over all recipes in configs/sae."""

import copy
import json
import math
import subprocess
import sys

import pytest
import torch

from mmsae import SAE, InputError
from mmsae.sae import AuxZipf, LossContext
from tests.helpers import naive
from tests.helpers.recipes import ROOT, SAE_RECIPES, Run, batch, small_model
from tests.helpers.resumed import KINDS, SAVED, run
from tests.helpers.training import environment

every = pytest.mark.parametrize("path", SAE_RECIPES, ids=lambda p: p.stem)


def started(path, seed=0):
    torch.manual_seed(seed)
    sae, losses = small_model(path)
    sae.fit_normaliser(batch(sae, 256, seed=10_000).x)
    return Run(sae, losses)


def fvu(sae, n=256):
    tokens = batch(sae, n, seed=20_000)
    with torch.no_grad():
        out = sae.eval()(tokens)
    x = tokens.x
    return sum(
        float((x[m] - out[m].x_hat).square().sum() / (x[m] - x[m].mean(0)).square().sum()) for m in x
    ) / len(x)  # fmt: skip


def dense(sae, tokens):
    with torch.no_grad():
        return {m: out.codes.to_dense() for m, out in sae.eval()(tokens).items()}


@every
def test_it_learns(path):
    run = started(path)
    losses = run.go(1)
    before = fvu(run.sae)
    run.sae.train()
    losses += run.go(150)
    assert torch.isfinite(torch.tensor(losses)).all()
    assert fvu(run.sae) < min(0.9 * before, 0.9)
    assert all((codes != 0).any() for codes in dense(run.sae, batch(run.sae, 64)).values())


@every
def test_saved_and_loaded_it_has_equal_codes(path, tmp_path):
    run = started(path)
    run.go(12)
    tokens = batch(run.sae, 50, seed=3)
    again = SAE.from_pretrained(run.sae.eval().save_pretrained(tmp_path / "sae"))
    for m, codes in dense(run.sae, tokens).items():
        assert torch.equal(dense(again, tokens)[m], codes)
    with torch.no_grad():
        for m, out in again(tokens).items():
            assert torch.equal(out.x_hat, run.sae(tokens)[m].x_hat)


@every
def test_a_resumed_training_goes_on_to_the_same_losses(path):
    run = started(path)
    run.go(7)
    state = copy.deepcopy(run.state())
    other = started(path, seed=1)
    other.restore(state)
    assert other.go(5) == run.go(5)
    l0 = [{m: (c != 0).sum().item() for m, c in dense(r.sae, batch(r.sae, 64)).items()} for r in (run, other)]
    assert l0[0] == l0[1]


@every
def test_in_evaluation_a_row_is_coded_without_the_others(path):
    run = started(path)
    run.go(12)
    tokens = batch(run.sae, 40, seed=4)
    together = dense(run.sae, tokens)
    for i in (0, 17, 39):
        one = tokens._replace(
            x={m: v[i : i + 1] for m, v in tokens.x.items()}, grad={m: v[i : i + 1] for m, v in tokens.grad.items()}
        )
        for m, codes in dense(run.sae, one).items():
            torch.testing.assert_close(codes[0], together[m][i], rtol=1e-5, atol=1e-6)


def in_double(run):
    """The SAE and its losses in double precision, every third latent dead or dying, and what losses look at."""
    run.usage.since[:, ::3] = 10**9
    for term in run.losses:
        if isinstance(term, AuxZipf):
            term.known.fill_(1.0)
            term.frequency[:] = 0.3
            term.frequency[:, ::3] = 0.0
    run.losses.double()
    return run.sae.double(), LossContext(run.sae, run.usage, 0.5, run.step)


@every
def test_gradients_are_those_of_the_dense_formulas(path):
    run = started(path)
    run.go(12)
    if run.sae.selector.name == "jumprelu":
        pytest.skip("the straight-through estimator is no gradient of a formula: tests/sae/variants/test_jumprelu.py")
    sae, ctx = in_double(run)
    out = sae(batch(sae, 64, seed=5))
    dense = naive.outputs(sae, out)
    want = naive.loss(run.losses, dense, ctx)
    got = sum(term(out, ctx) for term in copy.deepcopy(run.losses))
    torch.testing.assert_close(got, want, rtol=1e-9, atol=0)
    for m in out:
        torch.testing.assert_close(out[m].recon, dense[m].recon, rtol=1e-9, atol=1e-9)
    names, weights = zip(*sae.named_parameters(), strict=True) if run.optimizer else ((), ())
    if not weights:  # atoms that are rows of the data
        assert not got.requires_grad
        return
    found = (torch.autograd.grad(loss, weights, allow_unused=True) for loss in (got, want))
    for name, weight, *both in zip(names, weights, *found, strict=True):
        a, b = (torch.zeros_like(weight) if g is None else g for g in both)
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10, msg=lambda said, n=name: f"{n}: {said}")


@every
def test_rows_of_zeros_and_single_rows_give_no_nan(path):
    run = started(path)
    run.go(3)
    least = 12 if run.sae.selector.name == "feature_choice" else 1  # one row for each of 48 latents at k = 4
    few, none = batch(run.sae, least, seed=6), batch(run.sae, 24, seed=7)
    some = none._replace(x={m: v * (torch.arange(24) > 3)[:, None] for m, v in none.x.items()})
    none = none._replace(x={m: 0 * v for m, v in none.x.items()}, grad={m: 0 * v for m, v in none.grad.items()})
    for tokens in (few, some, none):
        run.sae.train()
        assert math.isfinite(run.on(tokens))
        assert all(p.isfinite().all() for p in run.sae.parameters())
        with torch.no_grad():
            for out in (*run.sae(tokens).values(), *run.sae.eval()(tokens).values()):
                assert out.x_hat.isfinite().all() and out.codes.values.isfinite().all()


@every
def test_no_rows_have_empty_codes_and_no_loss(path):
    run = started(path)
    run.go(2)
    tokens = batch(run.sae, 4)
    tokens = tokens._replace(x={m: v[:0] for m, v in tokens.x.items()}, grad={m: v[:0] for m, v in tokens.grad.items()})
    with pytest.raises(InputError, match="no image rows in this batch of a training"):
        run.sae(tokens)
    for m, codes in dense(run.sae, tokens).items():
        assert codes.shape == (0, 48) and run.sae.encode(tokens.x[m], m).n == 0


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision_about_it_changes_no_code(path, dtype):
    run = started(path)
    run.go(5)
    tokens = batch(run.sae, 64, seed=8)
    for training in (True, False):
        found = []
        for half in (True, False):
            sae = copy.deepcopy(run.sae).train(training)  # running thresholds and noise go on in training
            with torch.no_grad(), torch.autocast("cpu", dtype, enabled=half):
                found.append({m: (out.codes.to_dense(), out.x_hat) for m, out in sae(tokens).items()})
        for m, (codes, x_hat) in found[0].items():
            assert torch.equal(codes, found[1][m][0]) and torch.equal(x_hat, found[1][m][1])


def test_a_fresh_process_goes_on_to_the_same_losses(tmp_path):
    whole = {kind: run(tmp_path / kind, kind) for kind in KINDS}
    command = [sys.executable, "-W", "ignore", "-m", "tests.helpers.resumed", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, env=environment(), check=True, capture_output=True, timeout=300)
    for kind, (losses, on) in json.loads((tmp_path / "resumed.json").read_text()).items():
        assert losses == whole[kind][0][SAVED:], kind
        assert on == whole[kind][1] and sum(on) > 0, kind
