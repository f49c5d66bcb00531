"""Monosemanticity as a loss: multimodal_saes, sections 3 and 8."""

import pytest
import torch

from mmsae import SAE, InputError
from mmsae.metrics.concepts.monosemanticity import monosemanticity
from mmsae.sae import LossContext, MonoScore, Reconstruction, TopK
from mmsae.sae.variants.mono_loss import batch_monosemanticity
from mmsae.types import SAEOutput
from tests.helpers.pairs import as_codes, random_codes
from tests.helpers.recipes import batch

both = pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])


def rows(n=40, d=6):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(3))


@both
def test_it_is_the_metric_of_the_batch(sparse):
    z = random_codes(40, 12, 3)
    z[:, 2], z[:, 5] = 0.0, z[:, 5] + 0.5  # dead, and one that fires on every row
    z[:, 7] = 0.0
    z[4, 7] = 1.0  # on one row
    want = monosemanticity(as_codes(z), rows()).score
    got = batch_monosemanticity(as_codes(z, sparse), rows())
    assert torch.equal(got.isnan(), want.isnan()) and got.isnan().sum() == 2
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5, equal_nan=True)


def loss(z, e, sparse=True, **kw):
    out = {"image": SAEOutput(None, as_codes(z, sparse), e, None)}
    return MonoScore(1.0)(out, LossContext(None, **kw))


@both
def test_gradients_are_those_of_the_double_sum(sparse):
    e = torch.nn.functional.normalize(rows(), dim=1)
    z = random_codes(40, 12, 3).requires_grad_()
    a = z * 1.0
    pairs = torch.triu(torch.ones(40, 40), 1)
    terms = [(torch.outer(a[:, j], a[:, j]) * pairs) for j in range(12)]
    naive = 1 - torch.stack([(t * (e @ e.T)).sum() / t.sum() for t in terms]).mean()
    ours = loss(z, rows(), sparse)
    torch.testing.assert_close(ours, naive, rtol=1e-4, atol=1e-5)
    on = z.detach() > 0
    got, want = (torch.autograd.grad(v, z)[0][on] for v in (ours, naive))
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-6)


def test_latents_on_equal_rows_cost_nothing_and_on_opposite_rows_twice():
    e = torch.tensor([[1.0, 0.0], [2.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    assert float(loss([[1.0], [3.0], [0.0], [0.0]], e)) == pytest.approx(0.0, abs=1e-6)
    assert float(loss([[1.0], [0.0], [3.0], [0.0]], e)) == pytest.approx(2.0, rel=1e-5)
    assert float(loss([[1.0], [0.0], [0.0], [3.0]], e)) == pytest.approx(1.0, rel=1e-5)
    nothing = loss(torch.zeros(4, 1, requires_grad=True), e)
    assert float(nothing) == 0.0
    assert float(loss([[1.0], [0.0], [0.0], [3.0]], e, progress=0.05)) == pytest.approx(0.5)


def test_training_with_it_makes_latents_fire_on_rows_that_are_alike():
    scores = []
    for coefficient in (0.0, 2.0):
        torch.manual_seed(0)
        sae = SAE(16, 48, modalities=["image"], selector=TopK(4))
        sae.fit_normaliser(batch(sae, 256, seed=9).x)
        optimizer = torch.optim.Adam(sae.parameters(), 3e-3)
        terms = [Reconstruction(), MonoScore(coefficient)]
        for i in range(120):
            out, ctx = sae(batch(sae, 128, seed=i)), LossContext(sae)
            optimizer.zero_grad()
            sum(t(out, ctx) for t in terms).backward()
            optimizer.step()
            sae.after_step_()
        tokens = batch(sae, 500, seed=20_000)
        with torch.no_grad():
            scores.append(monosemanticity(sae(tokens)["image"].codes, tokens.x["image"]).summary()["mean"])
    assert scores[1] > scores[0] + 0.02, scores


def test_signed_codes_are_refused():
    with pytest.raises(InputError, match="non-negative codes: those of 'topk' have signs"):
        MonoScore().check(SAE(8, 12, modalities=["image"], selector=TopK(2, score="abs")))
