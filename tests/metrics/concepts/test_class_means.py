"""Sparse codes give what their matrix gives, which is not made."""

import pytest
import torch

from mmsae.metrics.concepts.class_means import ClassMeans, NearestMean
from mmsae.types import Codes

F, C = 40, 3


@pytest.fixture
def batch(monkeypatch):
    g = torch.Generator().manual_seed(0)
    indices = torch.rand(60, F - 4, generator=g).topk(5).indices + 2  # some latents never fire
    values = torch.randn(60, 5, generator=g) * (torch.rand(60, 5, generator=g) > 0.2)
    codes, labels = Codes(values, indices, F), torch.arange(60) % (C + 1) - 1
    dense = codes.to_dense()
    monkeypatch.setattr(Codes, "to_dense", lambda self: pytest.fail("a matrix of codes is made"))
    return codes, dense, labels


def test_class_means(batch):
    codes, dense, labels = batch
    found = ClassMeans(C, F)
    table = found.total.data_ptr()
    for part in torch.arange(60).split(7):
        found.update(codes.rows(part), labels[part])
    assert found.total.data_ptr() == table  # no second table is made, at no update
    wanted = torch.stack([dense[labels == c].double().mean(0) for c in range(C)])
    torch.testing.assert_close(found.compute(), wanted, rtol=1e-12, atol=1e-12)
    assert found.count.tolist() == [int((labels == c).sum()) for c in range(C)]
    before = found.total.clone()
    torch.testing.assert_close(found(codes, labels), wanted, rtol=1e-12, atol=1e-12)  # of this batch alone
    torch.testing.assert_close(found.total, 2 * before, rtol=1e-12, atol=1e-12)  # torchmetrics' own copies are copies
    found.reset()
    assert not found.total.any() and not found.count.any()


def test_nearest_mean(batch):
    codes, dense, labels = batch
    means = torch.randn(C, F, generator=torch.Generator().manual_seed(1))
    means = torch.cat([means, torch.full((1, F), torch.nan)])  # a class without rows
    sparse, plain = NearestMean(means), NearestMean(means)
    sparse.update(codes, labels)
    plain.update(dense, labels)
    nearest = torch.nn.functional.cosine_similarity(dense[:, None], means[None, :C], dim=2).argmax(1)
    assert sparse.hit.sum() == (nearest == labels).sum() > 0
    assert torch.equal(sparse.hit, plain.hit) and torch.equal(sparse.count, plain.count)
