"""Closed form against the loop over pairs, the oracles of the specification, counts, ranks."""

import math

import pytest
import torch

from mmsae.metrics.concepts.monosemanticity import KINDS, Monosemanticity, cross_monosemanticity, monosemanticity
from mmsae.types import Codes, InputError

E1 = torch.tensor([[1.0, 0], [1, 0], [0, 1]])
E2 = torch.tensor([[1.0, 0], [0, 1], [1, 1]])


def loop(a, e):
    """The published double loop, one feature."""
    a = (a - a.min()) / (a.max() - a.min())
    e = torch.nn.functional.normalize(e.double(), dim=1)
    top = below = 0.0
    for n in range(len(a)):
        for m in range(n + 1, len(a)):
            w = float(a[n] * a[m])
            top, below = top + w * float(e[n] @ e[m]), below + w
    return top / below if below else math.nan


@pytest.mark.parametrize(
    ("a", "e", "want"),
    [
        ([1, 1, 0], E1, 1.0),
        ([1, 0.5, 0], E1, 1.0),
        ([2, 1, 1], E1, math.nan),
        ([1, 1, 1], E1, math.nan),
        ([3, 1, 2], E2, 2**-0.5),
        ([1, 3, 0], E2, 0.0),
    ],
)
def test_oracles(a, e, want):
    got = monosemanticity(torch.tensor(a, dtype=torch.float64)[:, None], e).score.item()
    assert got == pytest.approx(want, abs=1e-12, nan_ok=True)


def test_closed_form_equals_the_loop_and_does_not_care_for_order_scale_or_batches():
    g = torch.Generator().manual_seed(0)
    a = torch.rand(40, 6, generator=g, dtype=torch.float64).pow(3) - 0.2  # signed, like neurons
    e = torch.randn(40, 5, generator=g)
    got = monosemanticity(a, e)
    want = torch.tensor([loop(a[:, j], e) for j in range(6)], dtype=torch.float64)
    torch.testing.assert_close(got.score, want, rtol=0, atol=1e-12)
    order = torch.randperm(40, generator=g)
    for other in (monosemanticity(a[order], e[order]), monosemanticity(3 * a + 7, e), monosemanticity(a, e, chunk=7)):
        torch.testing.assert_close(other.score, got.score, rtol=0, atol=1e-11)
    unit = torch.nn.functional.normalize(e.double(), dim=1)
    pairs = (unit @ unit.T)[tuple(torch.triu_indices(40, 40, 1))]
    assert got.chance == pytest.approx(pairs.mean().item(), abs=1e-12)
    assert pairs.min() <= got.score.min() and got.score.max() <= pairs.max()


def test_codes_give_what_their_matrix_gives_which_is_not_made(monkeypatch):
    """Latents of every row and of none, always above or below 0, and entries that are 0."""
    g = torch.Generator().manual_seed(3)
    indices = torch.cat([torch.zeros(30, 1, dtype=torch.long), torch.rand(30, 8, generator=g).topk(3).indices + 1], 1)
    values = torch.randn(30, 4, generator=g) * (torch.rand(30, 4, generator=g) > 0.2)
    values[:, 0] = values[:, 0].abs() + 1  # latent 0 fires on every row
    values = torch.where(indices == 1, -values.abs(), values)
    codes, e = Codes(values, indices, 12), torch.randn(30, 5, generator=g)
    dense, sparse, plain = codes.to_dense(), Monosemanticity(12, 5), Monosemanticity(12, 5)
    monkeypatch.setattr(Codes, "to_dense", lambda self: pytest.fail("a matrix of codes is made"))
    for part in torch.arange(30).split(7):
        sparse.update(codes.rows(part), e[part])
        plain.update(dense[part], e[part])
    assert torch.equal(sparse.low, dense.amin(0).double()) and torch.equal(sparse.high, dense.amax(0).double())
    assert sparse.low[0] > 0 and sparse.high[1] == 0 and (sparse.high[9:] == 0).all()
    for name in ("n", "total", "weighted", "sum_a", "sum_aa"):
        torch.testing.assert_close(getattr(sparse, name), getattr(plain, name), rtol=1e-12, atol=1e-12)


def test_equal_embeddings_score_one():
    a = torch.rand(9, 3)
    assert monosemanticity(a, torch.ones(9, 4)).score == pytest.approx(1)


def test_sparse_codes_and_the_counts():
    n, f = 30, 5
    z = torch.zeros(n, f)
    z[:10, 0] = 1.0  # scored
    z[3, 1] = 2.0  # one sample
    z[:, 2] = 0.7  # constant
    z[:2, 4] = torch.tensor([0.3, 1e-3])  # two samples, one of them small: scored
    v, i = z.topk(4, dim=1)
    e = torch.randn(n, 6)
    got = monosemanticity(Codes(v, i, f), e)
    assert [KINDS[k] for k in got.kind] == ["scored", "single", "constant", "dead", "scored"]
    torch.testing.assert_close(got.score, monosemanticity(z, e).score, equal_nan=True)
    unit = torch.nn.functional.normalize(e.double(), dim=1)
    assert got.score[4].item() == pytest.approx(float(unit[0] @ unit[1]), abs=1e-9)
    s = got.summary()
    assert (s["scored"], s["dead"], s["constant"], s["single"], s["samples"]) == (2, 1, 1, 1, n)
    assert s["mean"] == pytest.approx(got.score[[0, 4]].mean().item()) and s["above_chance"] == s["mean"] - s["chance"]


def test_planted_classes_are_above_chance_and_random_features_are_not():
    g = torch.Generator().manual_seed(1)
    label = torch.arange(600) % 6
    e = torch.nn.functional.one_hot(label, 6).float() + 0.1 * torch.randn(600, 6, generator=g)
    planted = torch.nn.functional.one_hot(label, 6).double() * torch.rand(600, 6, generator=g)
    noise = torch.rand(600, 6, generator=g) * (torch.rand(600, 6, generator=g) < 0.2)
    assert (monosemanticity(planted, e).score > 0.8).all()
    got = monosemanticity(noise, e)
    assert abs(got.score - got.chance).max() < 0.1


def test_rows_must_agree():
    with pytest.raises(InputError, match="3 rows of features for 4"):
        monosemanticity(torch.rand(3, 2), torch.rand(4, 2))
    with pytest.raises(InputError, match="3 rows of features for 4"):
        Monosemanticity(2, 2).update(torch.rand(3, 2), torch.rand(4, 2))


def seen(a, e):
    metric = Monosemanticity(a.shape[1], e.shape[1])
    for part in torch.arange(len(a)).split(7):
        metric.update(a[part], e[part])
    return metric


def test_over_modalities_it_is_the_double_sum():
    """multimodal_saes, section 3: the linear form is the double sum, split latents score 0."""
    g = torch.Generator().manual_seed(0)
    a, b = torch.rand(30, 5, generator=g, dtype=torch.float64), torch.rand(20, 5, generator=g, dtype=torch.float64)
    e, f = torch.randn(30, 6, generator=g), torch.randn(20, 6, generator=g)
    a[:, 1], b[:, 2] = 0.0, 0.4  # fires on texts alone; varies on images alone
    a[:, 3], b[:, 3] = 0.0, 0.0
    got = cross_monosemanticity(seen(a, e), seen(b, f))
    cosine = torch.nn.functional.normalize(e.double(), dim=1) @ torch.nn.functional.normalize(f.double(), dim=1).T
    for j in (0, 4):
        x, y = ((v[:, j] - v[:, j].min()) / (v[:, j].max() - v[:, j].min()) for v in (a, b))
        weight = torch.outer(x, y)
        assert got[j].item() == pytest.approx(((weight * cosine).sum() / weight.sum()).item(), abs=1e-8)
    assert got[1] == 0 and got[2] == 0 and got[3].isnan()


def test_a_concept_of_both_modalities_scores_more_than_one_of_other_things():
    kind = torch.arange(60) % 3
    e = torch.nn.functional.one_hot(kind, 3).double()
    same = cross_monosemanticity(seen(e, e), seen(e, e))
    assert same == pytest.approx(1.0)
    assert cross_monosemanticity(seen(e, e), seen(e.roll(1, 1), e)) == pytest.approx(0.0, abs=1e-12)
    with pytest.raises(InputError, match=r"images have \(3, 3\).*texts \(2, 3\)"):
        cross_monosemanticity(seen(e, e), seen(e[:, :2], e))
