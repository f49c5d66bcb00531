"""Probes against numpy and scikit-learn's own call, dense against sparse, and k-sparse probing of planted features."""

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix

from mmsae.metrics.concepts.probing import (
    choose_l2,
    class_means,
    logistic,
    matrix,
    most_different,
    nearest_mean,
    predictions,
    sparse_probing,
    total_variance,
)
from mmsae.types import Codes, InputError


@pytest.fixture
def data():
    g = torch.Generator().manual_seed(0)
    y = torch.arange(300) % 3
    x = torch.randn(3, 10, generator=g)[y] + 0.7 * torch.randn(300, 10, generator=g)
    return x, y.numpy()


def test_sparse_codes_become_the_same_matrix():
    v, i = torch.rand(20, 3), torch.rand(20, 8).argsort(1)[:, :3]
    v[4] = 0
    z = Codes(v, i, 8)
    x = matrix(z)
    assert np.array_equal(x.toarray(), z.to_dense().double().numpy()) and x.nnz == 57
    dense = matrix(z.to_dense())
    assert total_variance(x) == pytest.approx(dense.var(0).sum()) == pytest.approx(total_variance(dense))


def objective(probe, x, y, l2, scale):
    s = probe.scores(x)
    s = s - s.max(1, keepdims=True)
    nll = -(s[np.arange(len(y)), y] - np.log(np.exp(s).sum(1))).sum()
    return nll + l2 / 2 * np.square(probe.weight * scale).sum()


def test_logistic_minimises_what_it_says_on_scaled_features(data):
    x, y = matrix(data[0]), data[1]
    probe = logistic(x, y, 3, 1.0)
    scale = total_variance(x) ** 0.5
    best = objective(probe, x, y, 1.0, scale)
    rng = np.random.default_rng(0)
    for _ in range(20):
        moved = probe._replace(weight=probe.weight + 0.01 / scale * rng.standard_normal(probe.weight.shape))
        assert objective(moved, x, y, 1.0, scale) > best
    same = predictions(logistic(100 * x, y, 3, 1.0), 100 * x)  # one grid for all scales
    assert (same == predictions(probe, x)).float().mean() > 0.99


def test_two_classes_and_absent_ones(data):
    x, y = matrix(data[0]), data[1]
    two = y < 2
    probe = logistic(x[two], y[two], 4, 1.0)
    s = probe.scores(x)
    assert s.shape == (300, 4) and np.isneginf(s[:, 2:]).all() and set(predictions(probe, x).tolist()) <= {0, 1}
    from sklearn.linear_model import LogisticRegression

    scale = total_variance(x[two]) ** 0.5
    want = LogisticRegression(C=1.0, tol=1e-5, max_iter=200).fit(x[two] / scale, y[two]).predict(x / scale)
    assert np.array_equal(predictions(probe, x).numpy(), want)
    with pytest.raises(InputError, match="two classes"):
        logistic(x[y == 0], y[y == 0], 3, 1.0)


def test_nearest_mean_is_the_highest_cosine(data):
    x, y = data
    means = torch.stack([x[torch.from_numpy(y == c)].mean(0) for c in range(3)])
    want = torch.cosine_similarity(x[:, None], means[None], dim=2).argmax(1)
    assert torch.equal(predictions(nearest_mean(matrix(x), y, 3), matrix(x)), want)


def test_class_means_are_numpys_of_dense_and_sparse_rows(data):
    x, y = matrix(data[0]), data[1] + 1  # class 0 and class 4 have no rows
    sparse = csr_matrix(x * (np.abs(x) > 1))
    for rows, dense in ((x, x), (sparse, sparse.toarray())):
        mean, n = class_means(rows, y, 5)
        assert n.tolist() == [0, 100, 100, 100, 0] and not mean[[0, 4]].any()
        for c in (1, 2, 3):
            np.testing.assert_allclose(mean[c], dense[y == c].mean(0), rtol=1e-12, atol=1e-15)


def test_most_different_features_come_first():
    y = np.array([0, 0, 1, 1, 2, 2])
    x = np.zeros((6, 4))
    x[y == 1, 2], x[y == 2, 0], x[:, 3] = 3, 1, 9  # 3 is large but the same everywhere
    assert most_different(x, y, 3, 2).tolist() == [2, 0]


def test_l2_is_chosen_on_validation_rows(data):
    x, y = matrix(data[0]), data[1]
    probe, l2 = choose_l2(x, y, (x, y), 3, (1.0, 1e7))  # the strong penalty leaves a constant
    assert l2 == 1.0 and (predictions(probe, x).numpy() == y).mean() > 0.85
    assert choose_l2(x, y, (x, np.full_like(y, 7)), 3, (1.0, 1e7))[1] == 1e7  # equals: the strongest


def test_one_planted_feature_tells_its_concept_and_noise_does_not():
    g = torch.Generator().manual_seed(3)

    def draw(n):
        truth = torch.rand(n, 3, generator=g) < torch.tensor([0.3, 0.3, 0.004])
        z = torch.rand(n, 12, generator=g)
        z[:, 5] = truth[:, 0] + 0.1 * z[:, 5]
        return z, truth

    (a, ta), (b, tb) = draw(800), draw(800)
    got = sparse_probing(a, ta, b, tb)
    assert got.accuracy[1][0] > 0.99 and got.accuracy[0][0] > 0.97
    assert abs(got.accuracy[1][1] - 0.5) < 0.12 and got.accuracy[1][2].isnan()  # too rare to be scored
    assert int(got.test[0]) == 2 * int(tb[:, 0].sum()) and int(got.train[2]) == 0
    v, i = a.topk(12, dim=1)
    sparse = sparse_probing(Codes(v, i, 12), ta, b, tb, ks=(1,))
    assert torch.equal(sparse.accuracy[1][:2], got.accuracy[1][:2])
