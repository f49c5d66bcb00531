"""What a validation reports does not depend on how the data is cut into batches."""

import pytest
import torch
from torch.nn.functional import normalize

from mmsae import SAE
from mmsae.metrics.validation import PairCosine, ValidationMetrics
from mmsae.sae import TopK
from mmsae.types import Codes, Tokens

N, D, F = 30, 6, 12


def sparse(g, k=3):
    return Codes(torch.rand(N, k, generator=g).sub(0.2).relu(), torch.rand(N, F, generator=g).argsort(1)[:, :k], F)


def test_shuffled_is_the_mean_over_all_mismatched_pairs():
    g = torch.Generator().manual_seed(0)
    a, b = sparse(g), sparse(g)
    cosine = normalize(a.to_dense(), dim=1) @ normalize(b.to_dense(), dim=1).T
    off = ~torch.eye(N, dtype=torch.bool)
    for size in (N, 7, 1):
        metric = PairCosine(F)
        for at in range(0, N, size):
            metric.update(*(c.rows(torch.arange(at, min(at + size, N))) for c in (a, b)))
        got = metric.compute()
        assert got["code_cosine/pair"].item() == pytest.approx(cosine.diag().mean().item(), abs=1e-6)
        assert got["code_cosine/shuffled"].item() == pytest.approx(cosine[off].mean().item(), abs=1e-6)
    dense = PairCosine(F)
    dense.update(*(Codes(c.to_dense(), None, F) for c in (a, b)))
    assert dense.compute()["code_cosine/shuffled"].item() == pytest.approx(cosine[off].mean().item(), abs=1e-6)


def test_a_rank_without_pairs_and_a_single_pair():
    metric = PairCosine(F)
    metric.update()
    assert metric.compute() == {}
    g = torch.Generator().manual_seed(1)
    metric = PairCosine(F)
    metric.update(*(sparse(g).rows(torch.arange(1)) for _ in range(2)))
    assert set(metric.compute()) == {"code_cosine/pair"}


def test_every_figure_is_the_same_for_any_batches():
    torch.manual_seed(0)
    sae = SAE(D, 24, selector=TopK(4))
    x = {m: torch.randn(N, D) + s for m, s in (("image", 1), ("text", -1))}
    sae.fit_normaliser(x)
    reports = []
    for size in (N, 11, 1):
        metrics = ValidationMetrics(sae.modalities, sae.d_in, sae.d_sae)
        for at in range(0, N, size):
            batch = Tokens.pooled({m: v[at : at + size] for m, v in x.items()})
            metrics.update(batch, sae(batch))
        reports.append({k: v.item() for k, v in metrics.compute().items()})
    assert len(reports[0]) == 17
    assert reports[1] == pytest.approx(reports[0], abs=1e-5) and reports[2] == pytest.approx(reports[0], abs=1e-5)
