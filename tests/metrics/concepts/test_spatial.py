"""Moran's I against its formula, by hand, and against visaebench."""

import numpy as np
import pytest
import torch

from mmsae.metrics.concepts.spatial import Localisation, morans_i, neighbours
from mmsae.types import Codes


def by_formula(x):
    """The double sum over pairs of cells, for one map."""
    h, w = x.shape
    c = x - x.mean()
    total = links = 0.0
    for i in range(h):
        for j in range(w):
            for a in range(h):
                for b in range(w):
                    if max(abs(i - a), abs(j - b)) == 1:
                        links += 1
                        total += c[i, j] * c[a, b]
    return h * w / links * total / (c**2).sum()


def test_numbers_by_hand():
    # two by two: all cells are neighbours, so the sum over pairs is (sum c)^2 - sum c^2 = -sum c^2, and I = 4/12 * -1
    assert morans_i(torch.tensor([[1.0, 5.0], [2.0, 0.0]]).view(1, 2, 2, 1)).item() == pytest.approx(-1 / 3)
    assert neighbours(torch.ones(1, 3, 4, 1))[0, ..., 0].tolist() == [[3, 5, 5, 3], [5, 8, 8, 5], [3, 5, 5, 3]]
    half = torch.zeros(1, 6, 6, 1)
    half[:, :3] = 1
    board = torch.tensor([[float((i + j) % 2) for j in range(6)] for i in range(6)]).view(1, 6, 6, 1)
    assert morans_i(half).item() > 0.6 and morans_i(board).item() < 0
    assert morans_i(torch.ones(1, 3, 3, 1)).isnan().all()


def test_maps_of_any_shape_are_the_double_sum():
    x = torch.rand(2, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    want = [[by_formula(x[b, ..., f].double().numpy()) for f in range(4)] for b in range(2)]
    np.testing.assert_allclose(morans_i(x).numpy(), want, atol=1e-12)


def images(n=12, cells=36, d=9):
    """Sparse codes: latent 0 in one corner, others anywhere, the last everywhere, the one before on two patches."""
    g = torch.Generator().manual_seed(0)
    dense = torch.rand(n, cells, d, generator=g) * (torch.rand(n, cells, d, generator=g) < 0.3)
    corner = torch.zeros(6, 6)
    corner[:3, :3] = 1
    dense[..., 0] = torch.rand(n, cells, generator=g) * corner.flatten()
    dense[..., -1] += 0.1
    dense[..., -2] = 0
    dense[:, :2, -2] = 1
    return dense


def scored(dense, images=5, order=None):
    case = Localisation(dense.shape[2])
    values, indices = dense.flatten(0, 1).sort(descending=True)
    case.add(Codes(values, indices, dense.shape[2], "image"), (6, 6), order)
    return case.scores(images)


def test_latents_that_fire_everywhere_or_hardly_are_left_out():
    dense = images()
    found = scored(dense)
    assert found[-1].isnan() and found[-2].isnan() and not found[:-2].isnan().any()
    want = np.mean([by_formula(dense[i, :, 0].view(6, 6).double().numpy()) for i in range(12)])
    assert found[0].item() == pytest.approx(want, abs=1e-6) and found[0] > 0.3 > found[1:-2].max()
    shuffled = scored(dense, order=torch.rand(12, 36, generator=torch.Generator().manual_seed(1)).argsort(1))
    assert abs(shuffled[0].item() + 1 / 35) < 0.1
    assert scored(dense, images=13).isnan().all()


def test_sparse_codes_are_scored_as_their_matrix_which_is_not_made(monkeypatch):
    dense = images().flatten(0, 1)
    values, indices = dense.topk(4)
    codes = Codes(values, indices, 9, "image")
    whole, one = Localisation(9), Localisation(9)
    order = torch.rand(12, 36, generator=torch.Generator().manual_seed(1)).argsort(1)
    whole.add(Codes(codes.to_dense(), None, 9, "image"), (6, 6), order)
    monkeypatch.setattr(Codes, "to_dense", lambda self: pytest.fail("a matrix of codes is made"))
    one.add(codes, (6, 6), order)
    assert torch.equal(one.total, whole.total) and torch.equal(one.count, whole.count) and one.count.any()


def test_it_is_visaebenchs_own_number():
    localization = pytest.importorskip("visaebench.metrics.spatial_coherence.localization")
    dense = images(20)

    class Given:
        def encode(self, x):
            return x

    metric = localization.FeatureLocalization(grid_size=(6, 6), min_images_per_feature=5)
    theirs = metric.compute(Given(), dense, device="cpu")
    ours = scored(dense)
    per_latent = [float("nan") if v is None else v for v in theirs.metadata["per_feature_scores"]]
    np.testing.assert_allclose(ours.numpy(), per_latent, atol=1e-5)
    assert theirs.value == pytest.approx(ours[~ours.isnan()].mean().item(), abs=1e-5)
