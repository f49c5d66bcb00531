"""Linear probes on features: logistic regression, nearest class mean, and probes on a few features only.

The regression is scikit-learn's. All features of one space are divided by one number, the root of their total variance
on the training rows, so that one grid of L2 strengths means the same for embeddings and for codes.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmsae.types import Codes, InputError

L2 = tuple(10.0**i for i in range(-4, 3))
STEPS = 200  # of L-BFGS; enough for accuracies, not always for the last digits of weights


def matrix(features: Tensor | Codes) -> Any:
    """``(N, F)`` numpy float64 array, or a scipy CSR matrix for sparse codes."""
    if isinstance(features, Codes):
        if features.indices is None:
            return features.values.detach().double().cpu().numpy()
        from scipy.sparse import csr_matrix

        v, i = features.values.detach().double().cpu().numpy(), features.indices.cpu().numpy()
        ends = np.arange(0, v.size + 1, v.shape[1])
        out = csr_matrix((v.ravel(), i.ravel(), ends), shape=(features.n, features.d_sae))
        out.eliminate_zeros()
        return out
    return features.detach().double().cpu().numpy()


def total_variance(x: Any) -> float:
    """Sum of the variances of the columns."""
    mean = np.asarray(x.mean(0)).ravel()
    square = x.multiply(x).sum() if hasattr(x, "multiply") else np.square(x).sum()
    return float(square / x.shape[0] - mean @ mean)


class Probe(NamedTuple):
    """A fitted linear classifier."""

    weight: np.ndarray  #: ``(F', C)``
    bias: np.ndarray  #: ``(C,)``
    columns: np.ndarray | None = None  #: Features that it reads, or None for all

    def scores(self, x: Any) -> np.ndarray:
        """``(N, C)`` logits of rows as :func:`matrix` gives them."""
        return (x if self.columns is None else x[:, self.columns]) @ self.weight + self.bias


def logistic(x: Any, y: np.ndarray, classes: int, l2: float, columns: np.ndarray | None = None) -> Probe:
    """Multinomial logistic regression: minimises the summed cross-entropy plus ``l2 / 2`` times the squared weights.

    It takes sparse codes and stops when accuracies stand still; :func:`mmsae.evaluation.ood.detectors.linear_probe`
    minimises the same for logits whose order counts.

    Args:
        x: ``(N, F)`` from :func:`matrix`; divided by the root of its total variance, which the probe undoes.
        y: ``(N,)`` labels below ``classes``.
        classes: Number of classes C; those without rows get a logit of minus infinity.
        l2: Strength of the penalty, for features of total variance 1.
        columns: Features to use; default all.

    Raises:
        InputError: Fewer than two classes have rows.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    x = x if columns is None else x[:, columns]
    present = np.unique(y)
    if len(present) < 2:
        raise InputError(f"a probe needs two classes, the {len(y)} training rows have {len(present)}")
    scale = total_variance(x) ** 0.5
    scale = scale if scale > 0 else 1.0  # features that never vary: the probe learns the class frequencies
    model = LogisticRegression(C=1 / l2, max_iter=STEPS, tol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(x / scale, y)
    weight, bias = np.zeros((x.shape[1], classes)), np.full(classes, -np.inf)
    w, b = model.coef_.T / scale, model.intercept_
    if len(present) == 2:  # one column of the second class against the first
        w, b = np.concatenate([-w, w], 1) / 2, np.concatenate([-b, b]) / 2
    weight[:, present], bias[present] = w, b
    return Probe(weight, bias, columns)


def nearest_mean(x: Any, y: np.ndarray, classes: int) -> Probe:
    """The class whose mean row has the highest cosine with a row (the row's own norm does not change the order)."""
    mean, n = class_means(x, y, classes)
    mean = mean.T / np.maximum(np.linalg.norm(mean, axis=1), 1e-12)
    return Probe(mean, np.where(n > 0, 0.0, -np.inf))


def class_means(x: Any, y: np.ndarray, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """``(C, F)`` mean rows of classes, 0 of those without rows, and ``(C,)`` their numbers of rows."""
    from scipy.sparse import csr_matrix, issparse

    n = np.bincount(y, minlength=classes)
    total = csr_matrix((np.ones(len(y)), (y, np.arange(len(y)))), shape=(classes, len(y))) @ x
    return (total.toarray() if issparse(total) else total) / np.maximum(n, 1)[:, None], n


def most_different(x: Any, y: np.ndarray, classes: int, n: int) -> np.ndarray:
    """The n features whose class means differ most (largest minus smallest), in falling order; ties: the lower id."""
    means, count = class_means(x, y, classes)
    means = means[count > 0]
    spread = means.max(0) - means.min(0)
    return np.argsort(-spread, kind="stable")[:n]


def predictions(probe: Probe, x: Any) -> Tensor:
    """``(N,)`` int64 class of the highest score."""
    return torch.from_numpy(np.asarray(probe.scores(x)).argmax(1))


def choose_l2(
    x: Any,
    y: np.ndarray,
    val: tuple[Any, np.ndarray],
    classes: int,
    grid: Sequence[float] = L2,
    columns: np.ndarray | None = None,
) -> tuple[Probe, float]:
    """The probe of the L2 strength with the best accuracy on validation rows (the strongest among equals)."""
    best: tuple[float, float, Probe] | None = None
    for l2 in sorted(grid, reverse=True):
        probe = logistic(x, y, classes, l2, columns)
        accuracy = (predictions(probe, val[0]).numpy() == val[1]).mean()
        if best is None or accuracy > best[0]:
            best = (accuracy, l2, probe)
    return best[2], best[1]


class SparseProbe(NamedTuple):
    """Accuracies of probes on few features, ``(C,)`` float64 each; NaN for classes with too few rows."""

    accuracy: dict[int, Tensor]  #: ``{number of features (0: all): (C,)}``
    train: Tensor  #: Training rows per class, half of them positive
    test: Tensor  #: Test rows per class, half of them positive


def _balanced(truth: np.ndarray, most: int, seed: int) -> np.ndarray:
    """Numbers of ``most`` rows or fewer, half of which are positive, drawn with ``seed``."""
    rng = np.random.default_rng(seed)
    pos, neg = np.flatnonzero(truth), np.flatnonzero(~truth)
    n = min(len(pos), len(neg), most // 2)
    return np.concatenate([rng.permutation(pos)[:n], rng.permutation(neg)[:n]])


def sparse_probing(
    train: Tensor | Codes,
    train_truth: Tensor,
    test: Tensor | Codes,
    test_truth: Tensor,
    ks: Sequence[int] = (1, 2, 5),
    rows: tuple[int, int] = (4000, 1000),
    l2: float = 1.0,
    least: int = 20,
    seed: int = 0,
) -> SparseProbe:
    """k-sparse probing (arXiv 2305.01610, SAEBench arXiv 2503.09532): how few features tell each concept?

    For every concept the K features with the largest absolute difference of class means are chosen on balanced
    training rows; a logistic regression on them is scored on balanced test rows. 0 among the keys is all features.

    Args:
        train: ``(N, F)`` features or codes.
        train_truth: ``(N, C)`` bool concepts.
        test: Features or codes of other samples.
        test_truth: ``(M, C)`` bool.
        ks: Numbers of features.
        rows: Largest numbers of training and test rows.
        l2: Strength of the penalty.
        least: Rows of each kind that a concept must have in training and test.
        seed: Seed of the balanced draws, which are the same for every kind of feature.
    """
    x, held = matrix(train), matrix(test)
    c = train_truth.shape[1]
    accuracy = {k: torch.full((c,), torch.nan, dtype=torch.float64) for k in (*ks, 0)}
    sizes = torch.zeros(2, c, dtype=torch.long)
    for j in range(c):
        y, t = (v[:, j].cpu().numpy().astype(bool) for v in (train_truth, test_truth))
        a, b = _balanced(y, rows[0], seed + j), _balanced(t, rows[1], seed + j)
        if min(len(a), len(b)) < 2 * least:
            continue
        sizes[:, j] = torch.tensor([len(a), len(b)])
        own, labels = x[a], y[a].astype(int)
        order = most_different(own, labels, 2, max(ks))
        for k, values in accuracy.items():
            probe = logistic(own, labels, 2, l2, order[:k] if k else None)
            values[j] = (predictions(probe, held[b]).numpy() == t[b]).mean()
    return SparseProbe(accuracy, sizes[0], sizes[1])
