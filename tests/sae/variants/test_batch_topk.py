"""BatchTopK against the oracles of sae_variants, sections 1.3 and 6."""

import pytest
import torch

from mmsae import InputError
from mmsae.kernels import use
from mmsae.sae import BatchTopK, Dictionary, PreCodes, SelectContext

K, F = 4.5, 60


def selector(k=K, modalities=("image",), **kw):
    part = BatchTopK(k, **kw)
    part.build(F, modalities)
    return part


def rows_of(u, m="image"):
    return SelectContext(m, Dictionary(), u)


def dense(part, u, m="image"):
    values, indices = part(PreCodes(u, torch.eye(F), None), rows_of(u, m))
    return torch.zeros_like(u).scatter(1, indices, values)


def stationary(n, seed, spread=0.5):
    """Rows of unlike strength, so that a budget for the batch is not one for every row."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, F, generator=g) * (1 + spread * torch.rand(n, 1, generator=g))


@pytest.mark.parametrize("score", ["value", "abs"])
def test_a_batch_keeps_exactly_its_budget_and_rows_differ(score):
    u = stationary(64, 0)
    z = dense(selector(score=score), u)
    assert (z != 0).sum() == int(K * 64) and (z != 0).sum(1).float().std() > 0.5
    size = u.abs() if score == "abs" else u
    assert size[z != 0].min() > size[z == 0].max() and torch.equal(z[z != 0], u[z != 0])
    few = torch.full((4, F), -1.0)
    few[0, 3] = 2.0
    assert (dense(selector(), few) != 0).sum() == 1  # fewer positive entries than the budget


def test_a_permuted_batch_has_the_permuted_mask():
    u = stationary(64, 1)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(dense(selector(), u[order]), dense(selector(), u)[order])


def test_the_threshold_is_right_from_the_first_step_and_reproduces_the_mask():
    part, u = selector(decay=0.99), stationary(256, 2)
    z = dense(part, u)
    least = z[z > 0].min()
    assert float(part.threshold("image")) == pytest.approx(float(least), rel=1e-6)  # not (1 - decay) of it
    assert torch.equal(z != 0, u >= least)
    part.eval()
    part.sum_.copy_(part.weight_ * least)
    other = dense(part, u) != z
    assert other.sum() <= 1 and (u[other] == least).all()  # what is above the threshold: the entry at it may be lost


def test_the_threshold_is_the_bias_corrected_mean():
    part, least = selector(decay=0.9), []
    for step in range(30):
        z = dense(part, stationary(64, step))
        least.append(float(z[z > 0].min()))
        weights = [0.9 ** (step - i) for i in range(step + 1)]
        want = sum(w * m for w, m in zip(weights, least, strict=True)) / sum(weights)
        assert float(part.threshold("image")) == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("steps", [1, 50])
def test_in_evaluation_stationary_data_have_the_budget(steps):
    part = selector()
    for step in range(steps):
        dense(part, stationary(256, step))
    part.eval()
    l0 = (dense(part, stationary(2000, 1000)) != 0).sum(1).float().mean()
    assert float(l0) == pytest.approx(K, rel=0.1)


def test_a_modality_of_larger_scale_takes_nothing_from_the_other():
    both = ("image", "text")
    found = []
    for scale in (1.0, 1.5):
        part = selector(modalities=both)
        x = {"image": scale * stationary(256, 3), "text": stationary(256, 4)}
        train = [(dense(part, u, m) != 0).sum(1) for m, u in x.items()]
        part.eval()
        found.append([train, [(dense(part, u, m) != 0).sum(1) for m, u in x.items()]])
        assert part.threshold("image") != part.threshold("text")
    for before, after in zip(*found, strict=True):
        for a, b in zip(before, after, strict=True):
            assert torch.equal(a, b)


def test_what_was_not_trained_has_no_threshold_and_odd_numbers_are_refused():
    part = selector(modalities=("image", "text"))
    dense(part, stationary(16, 0), "text")
    part.eval()
    with pytest.raises(InputError, match="'batch_topk' has seen no image rows in training"):
        dense(part, stationary(16, 0))
    with pytest.raises(InputError, match="k must be above 0"):
        BatchTopK(0)
    with pytest.raises(InputError, match="decay must be at least 0 and below 1, not 1"):
        BatchTopK(decay=1.0)


def test_an_annealed_k_and_the_thresholds_survive_a_state_dict():
    a, b = selector(), selector()
    a.set_k(2.5)
    dense(a, stationary(64, 0))
    b.load_state_dict(a.state_dict())
    assert b.k == 2.5 and b.threshold("image") == a.threshold("image")


@pytest.mark.parametrize("score", ["value", "abs", "norm"])
def test_wide_batches_are_chosen_part_by_part_as_their_whole_matrix_would_be(score):
    torch.manual_seed(0)
    x, weight = torch.randn(600, 16), torch.randn(2000, 16)
    found = {}
    for name in ("torch", "reference"):
        part, pre = BatchTopK(4, score=score), PreCodes(x, weight.clone().requires_grad_(), torch.full((2000,), 0.1))
        part.build(2000, ("image",))
        dictionary = Dictionary()
        dictionary.weight = torch.nn.Parameter(weight)
        with use(name):
            values, indices = part(pre, SelectContext("image", dictionary, x))
            z = torch.zeros(600, 2000).scatter(1, indices, values)
            z.square().sum().backward()
        assert (pre._dense is None) == (name == "torch") and (z != 0).sum() == 2400
        found[name] = z.detach(), pre.weight.grad, part.threshold("image")
    for a, b in zip(*found.values(), strict=True):
        torch.testing.assert_close(a, b)
