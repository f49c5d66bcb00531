"""Do an SAE's latents serve on images of another kind? The composite of four shares that visaebench (M6) reports.

They are: how much of the other images' activations is reconstructed, how many of the latents that were on at home are
on there too, how alike the two sets of latents are, and how well ten latents tell the other images' classes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class Transfer(NamedTuple):
    """Four shares, each the larger the better."""

    reconstruction: float  #: 1 - FVU, kept in [0, 1].
    coverage: float  #: Share of the latents that are on at home which are on there, too.
    jaccard: float  #: Latents that are on in both over those that are on in either.
    probe: float  #: Accuracy of a classifier of k latents on a fifth of the images.

    @property
    def composite(self) -> float:
        """Their mean."""
        return float(np.mean(self))


def flat_fvu(x: Tensor, resid: Tensor, square: float, error: float, rows: Tensor) -> float:
    """The FVU of visaebench, which is not the pooled one.

    It takes ``sum|x|^2 / n - (sum of all entries / n)^2`` for the variance. The second term mixes the dimensions, so
    that a mean away from zero changes the result; it is 1 where the variance is not positive.

    Args:
        x: ``(m, d)`` mean activations of m images.
        resid: ``(m, d)`` mean residuals.
        square: Sum of ``|x|^2`` over all rows.
        error: Sum of the squared residuals over all rows.
        rows: ``(m,)`` rows of each image.
    """
    n = float(rows.sum())
    sums = [float((v.double().sum(1) * rows.double()).sum()) for v in (x, resid)]
    variance, missed = square / n - (sums[0] / n) ** 2, error / n - (sums[1] / n) ** 2
    return 1.0 if variance <= 0 else max(0.0, missed) / variance


def overlap(home: Tensor, there: Tensor) -> tuple[float, float]:
    """Coverage and Jaccard index of two ``(d_sae,)`` bool sets of latents that are on."""
    both, either, own = (int(t.sum()) for t in (home & there, home | there, home))
    return (both / own if own else 1.0), (both / either if either else 0.0)


def sparse_probe(x: Any, y: np.ndarray, k: int = 10, seed: int = 42) -> float:
    """Accuracy on a fifth of the images of a logistic regression (C = 1) on k features, chosen and fitted on the rest.

    Args:
        x: ``(n, F)`` array or CSR matrix.
        y: ``(n,)`` classes from 0.
        k: Features, those of the largest F statistic of the classes.
        seed: Of the split.
    """
    import warnings

    from scipy.sparse import issparse
    from sklearn.feature_selection import f_classif
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import train_test_split

    stratify = y if np.bincount(y).min() >= 2 else None
    fit, held, y_fit, y_held = train_test_split(x, y, test_size=0.2, stratify=stratify, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # constant features, and steps that end
        scores = np.nan_to_num(f_classif(fit, y_fit)[0], nan=-np.inf)
        top = np.argsort(scores)[::-1][:k]
        fit, held = (m[:, top].toarray() if issparse(m) else m[:, top] for m in (fit, held))
        probe = LogisticRegression(solver="lbfgs", max_iter=500, C=1.0, random_state=seed).fit(fit, y_fit)
    return float(probe.score(held, y_held))


def on(values: Tensor, indices: Tensor | None, d_sae: int) -> Tensor:
    """``(d_sae,)`` bool: the latents that are positive on some image, of codes ``(n, k)`` or dense ones."""
    if indices is None:
        return (values > 0).any(0)
    out = torch.zeros(d_sae, dtype=torch.bool)
    out[indices[values > 0]] = True
    return out
