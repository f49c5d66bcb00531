"""Detectors of out-of-distribution samples on plain features: confidences that are larger for ID samples.

Definitions are those of OpenOOD's post-processors (arXiv 2306.09301). Every detector is fitted on features of ID
training samples and then called on ``(n, D)`` features; it gives ``(n,)`` float64 confidences.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mmsae.metrics.components import axes_of
from mmsae.types import InputError

CHUNK = 2048  # rows at a time where a row meets the whole training set


def msp(logits: Tensor) -> Tensor:
    """Largest softmax probability (Hendrycks and Gimpel, arXiv 1610.02136)."""
    return logits.double().softmax(1).amax(1)


def max_logit(logits: Tensor) -> Tensor:
    """Largest logit (Hendrycks et al., arXiv 1911.11132)."""
    return logits.double().amax(1)


def energy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """``T logsumexp(logits / T)``, the negative free energy (Liu et al., arXiv 2010.03759)."""
    return temperature * (logits.double() / temperature).logsumexp(1)


class Head(NamedTuple):
    """A linear classifier on features."""

    weight: Tensor  #: ``(C, D)``
    bias: Tensor  #: ``(C,)``
    unit: bool = False  #: Whether features are normalised first, as zero-shot classifiers do
    #: Whether its classes are those of the ID set, in their order; a host's own classifier has its own.
    known: bool = True

    def space(self, f: Tensor) -> Tensor:
        """The features that ``weight`` multiplies."""
        f = f.double()
        return normalize(f, dim=1) if self.unit else f

    def __call__(self, f: Tensor) -> Tensor:
        """``(n, C)`` logits of ``(n, D)`` features."""
        return self.space(f) @ self.weight.T + self.bias


def cosine_head(classes: Tensor, scale: float = 100.0) -> Head:
    """The zero-shot classifier of class vectors ``(C, D)``: ``scale`` times cosines."""
    return Head(scale * normalize(classes.double(), dim=1), classes.new_zeros(len(classes)).double(), True)


@torch.enable_grad()
def linear_probe(f: Tensor, y: Tensor, n_classes: int, l2: float = 1e-3, steps: int = 100) -> Head:
    """Multinomial logistic regression of ``y (n,)`` on centred ``f (n, D)`` of mean squared norm D, by L-BFGS.

    ``l2`` weighs ``|W|^2 / 2`` beside the mean cross-entropy. This is the objective of
    :func:`mmsae.metrics.concepts.probing.logistic`, which serves accuracies; here a class without samples has a finite
    bias, as ViM needs, many classes take half the time, and AUROCs, which feel where training stops, stay as published.
    """
    f = f.detach().double()
    mean = f.mean(0)
    scale = (f - mean).square().mean().sqrt().clamp(min=1e-12)
    x = ((f - mean) / scale).float()
    w = torch.zeros(n_classes, x.shape[1], requires_grad=True)
    b = torch.zeros(n_classes, requires_grad=True)
    optimiser = torch.optim.LBFGS([w, b], max_iter=steps, line_search_fn="strong_wolfe", tolerance_change=1e-7)

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = torch.nn.functional.cross_entropy(x @ w.T + b, y) + l2 / 2 * w.square().sum()
        value.backward()
        return value

    optimiser.step(loss)
    weight = w.detach().double() / scale
    weight -= weight.mean(0)  # what all classes share changes no probability, but the pseudo-inverse
    bias = b.detach().double() - weight @ mean
    return Head(weight, bias - bias.mean())


def ledoit_wolf(x: Tensor) -> tuple[Tensor, float]:
    """Covariance of centred ``x (n, D)`` shrunk towards a multiple of the identity, and by how much.

    Ledoit and Wolf, "A well-conditioned estimator for large-dimensional covariance matrices", 2004.
    """
    n, d = x.shape
    s = x.T @ x / n
    mean = s.trace() / d
    square = s.square().sum()
    delta = (square - d * mean**2) / d
    beta = ((x.square().sum(1) ** 2).sum() / n - square) / (n * d)  # sum_ij of x_i^2 x_j^2 is the norm to the fourth
    shrinkage = float((beta.clamp(min=0) / delta).clamp(max=1)) if delta > 0 else 1.0
    return (1 - shrinkage) * s + shrinkage * mean * torch.eye(d, dtype=x.dtype), shrinkage


def class_covariance(
    f: Tensor, y: Tensor | None = None, n_classes: int = 1, shrink: bool | None = None
) -> tuple[Tensor, Tensor, float]:
    """``(C, D)`` class means, ``(D, D)`` common covariance about them, and how far it was shrunk.

    Arguments and errors are those of :meth:`Gaussians.fit`.
    """
    f = f.double()
    y = torch.zeros(len(f), dtype=torch.long) if y is None else y
    count = torch.bincount(y, minlength=n_classes)
    if (count == 0).any():
        raise InputError(f"class number {int((count == 0).nonzero()[0])} has no training sample to take a mean of")
    means = f.new_zeros(n_classes, f.shape[1]).index_add_(0, y, f) / count[:, None]
    x = f - means[y]
    shrink = too_few(len(f), f.shape[1], n_classes) if shrink is None else shrink
    cov, shrinkage = ledoit_wolf(x) if shrink else (x.T @ x / len(x), 0.0)
    return means, cov, shrinkage


def whitener(cov: Tensor) -> Tensor:
    """``(D, r)`` map under which a covariance of rank r is the identity."""
    values, vectors = torch.linalg.eigh(cov)
    kept = values > values[-1].clamp(min=1e-300) * len(values) * torch.finfo(values.dtype).eps
    return vectors[:, kept] / values[kept].sqrt()


class Gaussians(NamedTuple):
    """Means with one common covariance."""

    white: Tensor  #: ``(D, r)`` map under which the covariance is the identity (the pseudo-inverse's: r is its rank)
    means: Tensor  #: ``(C, r)`` mapped means
    shrinkage: float  #: How far the covariance was shrunk; 0 for the empirical one

    @classmethod
    def fit(cls, f: Tensor, y: Tensor | None = None, n_classes: int = 1, shrink: bool | None = None) -> Gaussians:
        """Fit ``f (n, D)`` with classes ``y (n,)``, every one with a sample; without y one Gaussian.

        ``shrink`` takes the covariance of Ledoit-Wolf instead of the empirical one; None: where the samples are too few
        for its rank, since an input in directions that training never used would look normal then.

        Raises:
            InputError: A class without a sample.
        """
        means, cov, shrinkage = class_covariance(f, y, n_classes, shrink)
        white = whitener(cov)
        return cls(white, means @ white, shrinkage)

    def distances(self, f: Tensor) -> Tensor:
        """``(n, C)`` squared Mahalanobis distances."""
        return torch.cdist(f.double() @ self.white, self.means, compute_mode="donot_use_mm_for_euclid_dist").square()


def too_few(n: int, d: int, n_classes: int = 1) -> bool:
    """Whether n samples give the covariance of d features about the class means no full rank."""
    return n - n_classes < d


class MDS(NamedTuple):
    """Mahalanobis distance to the nearest class mean (Lee et al., arXiv 1807.03888); of one class: to the mean."""

    classes: Gaussians

    def __call__(self, f: Tensor) -> Tensor:
        """``max_c -(f - mu_c)^T P (f - mu_c)``."""
        return -self.classes.distances(f).amin(1)


class RMDS(NamedTuple):
    """Relative Mahalanobis distance (Ren et al., arXiv 2106.09022): to the class, less that to everything."""

    classes: Gaussians
    whole: Gaussians

    @classmethod
    def fit(cls, f: Tensor, y: Tensor, n_classes: int, shrink: bool | None = None) -> RMDS:
        """Fit ``f (n, D)`` with classes ``y (n,)``.

        The covariance of everything is that within classes plus that of the class means. So both are shrunk alike;
        shrunk apart, directions that training never used can count more against "everything" than against the class,
        and OOD samples look normal.
        """
        means, cov, shrinkage = class_covariance(f, y, n_classes, shrink)
        share = torch.bincount(y, minlength=n_classes).double() / len(y)
        centre = share @ means
        between = (means - centre).T @ ((means - centre) * share[:, None])
        own, all_ = whitener(cov), whitener(cov + between)
        return cls(Gaussians(own, means @ own, shrinkage), Gaussians(all_, centre[None] @ all_, shrinkage))

    def __call__(self, f: Tensor) -> Tensor:
        """``max_c [-d_c + d_0]``."""
        return self.whole.distances(f)[:, 0] - self.classes.distances(f).amin(1)


class KNN(NamedTuple):
    """Distance to the k-th nearest training sample (Sun et al., arXiv 2204.06507)."""

    bank: Tensor  #: ``(n, D)`` unit training features

    @classmethod
    def fit(cls, f: Tensor) -> KNN:
        """Keep the training features ``(n, D)``."""
        return cls(normalize(f.double(), dim=1).float())

    def ladder(self, f: Tensor, ks: Sequence[int]) -> list[Tensor]:
        """Confidences for several k at once: minus the squared distance to the k-th nearest, k cut to the bank."""
        ks = [min(int(k), len(self.bank)) for k in ks]
        out = []
        for part in normalize(f.double(), dim=1).float().split(CHUNK):
            d2 = part.square().sum(1)[:, None] + self.bank.square().sum(1) - 2 * part @ self.bank.T
            near = d2.topk(max(ks), dim=1, largest=False).values.clamp(min=0)
            out.append(-near[:, [k - 1 for k in ks]])
        return list(torch.cat(out).double().unbind(1))


class ViM(NamedTuple):
    """Virtual-logit matching (Wang et al., arXiv 2203.10807)."""

    head: Head  #: The classifier
    origin: Tensor  #: ``(D,)`` ``-pinv(W) b``
    vectors: Tensor  #: ``(D, D)`` eigenvectors of the training features about the origin, largest first
    scales: Tensor  #: ``(D,)`` scale of the virtual logit for every number of leading directions that are left out
    dim: int  #: The number that is left out

    @classmethod
    def fit(cls, head: Head, f: Tensor, dim: int = 256) -> ViM:
        """Fit on training features ``(n, D)``; ``dim`` is cut below D so that a residual is left."""
        x = head.space(f)
        origin = -torch.linalg.pinv(head.weight, rtol=1e-6) @ head.bias  # rank C - 1 where rows sum to 0
        centred = x - origin
        vectors = axes_of(centred.T @ centred / len(x))[1]
        vim = cls(head, origin, vectors, torch.ones(len(vectors)), min(dim, len(vectors) - 1))
        top = max_logit(head(f)).mean()
        return vim._replace(scales=top / vim.residuals(f, range(len(vectors))).mean(0).clamp(min=1e-12))

    def residuals(self, f: Tensor, dims: Sequence[int]) -> Tensor:
        """``(n, len(dims))`` norms of what each number of leading directions does not hold, from one projection."""
        first = min(dims)
        square = ((self.head.space(f) - self.origin) @ self.vectors[:, first:]).square_()
        return square.flip(1).cumsum(1).flip(1)[:, [dim - first for dim in dims]].sqrt()

    def ladder(self, f: Tensor, dims: Sequence[int]) -> list[Tensor]:
        """``logsumexp(logits) - alpha |residual|`` for several numbers of leading directions at once."""
        dims = [min(int(dim), len(self.vectors) - 1) for dim in dims]
        return list((energy(self.head(f))[:, None] - self.scales[dims] * self.residuals(f, dims)).unbind(1))

    def __call__(self, f: Tensor) -> Tensor:
        """The same for ``dim``."""
        return self.ladder(f, [self.dim])[0]


class ReAct(NamedTuple):
    """Energy of features clipped from above (Sun et al., arXiv 2111.12797)."""

    head: Head  #: The classifier
    threshold: float  #: Value at which features are cut

    @classmethod
    def fit(cls, head: Head, f: Tensor, percentiles: Sequence[float] = (90.0,)) -> list[ReAct]:
        """One for each percentile of all ID activations ``f (n, D)``."""
        values = head.space(f).flatten().sort().values
        at = [min(len(values) - 1, int(len(values) * p / 100)) for p in percentiles]
        return [cls(head, values[i].item()) for i in at]

    def __call__(self, f: Tensor) -> Tensor:
        """``logsumexp`` of the logits of the clipped features."""
        x = self.head.space(f).clamp(max=self.threshold)
        return energy(x @ self.head.weight.T + self.head.bias)
