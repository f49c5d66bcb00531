"""What holds for every SAE of the literature, over all recipes in configs/sae."""

import copy

import pytest
import torch

from mmsae import SAE
from tests.helpers.recipes import SAE_RECIPES, Run, batch, small_model

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
