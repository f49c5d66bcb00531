"""How strongly each latent's image and text activations go together over pairs, and the pair scores built on it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize
from torchmetrics import Metric

from mmsae.kernels.pairs import code_cosine, paired_product
from mmsae.metrics.sparsity import latent_sums, summed
from mmsae.types import Codes


def _products(a: Codes, b: Codes) -> Tensor:
    """``(d_sae,)`` float64 sum over pairs of the product of each latent's two values."""
    if a.indices is None:
        a, b = b, a
    va, vb = (c.values.detach().double() for c in (a, b))
    if b.indices is not None:
        return summed(a, paired_product(va, a.indices, vb, b.indices))
    return summed(a, va * (vb if a.indices is None else vb.gather(1, a.indices)))


def pearson(n: Tensor, a: Tensor, b: Tensor, aa: Tensor, bb: Tensor, ab: Tensor) -> Tensor:
    """Correlation from sums over n pairs of both sides, their squares and their product; NaN where a side is constant.

    Sums of the two sides may have shapes that are broadcast.
    """
    cov = n * ab - a * b
    var_a = n * aa - a.square()
    var_b = n * bb - b.square()
    floor = 1e-12 * n  # what rounding leaves of the variance of a constant
    ok = (var_a > floor * aa) & (var_b > floor * bb)
    return torch.where(ok, cov / (var_a * var_b).clamp(min=1e-300).sqrt(), torch.nan).clamp(-1, 1)


class CrossCorrelation(Metric):
    """Pearson correlation, over pairs, of each latent's image value with its text value.

    One streaming pass with float64 sums of length ``d_sae``, added over ranks; sparse codes are never made dense.
    """

    full_state_update = False

    def __init__(self, d_sae: int, **kwargs):
        super().__init__(**kwargs)
        self.add_state("n", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        for name in ("a", "b", "aa", "bb", "ab"):
            self.add_state(f"sum_{name}", torch.zeros(d_sae, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, image: Codes, text: Codes) -> None:
        """Add one batch; row i of each side belongs to one pair."""
        self.n = self.n + image.n
        self.sum_a = self.sum_a + summed(image, image.values.detach().double())
        self.sum_b = self.sum_b + summed(text, text.values.detach().double())
        self.sum_aa = self.sum_aa + latent_sums(image)[1]
        self.sum_bb = self.sum_bb + latent_sums(text)[1]
        self.sum_ab = self.sum_ab + _products(image, text)

    def compute(self) -> Tensor:
        """``(d_sae,)`` float64; NaN where a side never varied (a latent dead in one modality has no correlation)."""
        return pearson(self.n, self.sum_a, self.sum_b, self.sum_aa, self.sum_bb, self.sum_ab)


@torch.no_grad()
def cross_correlation(image: Codes, text: Codes) -> Tensor:
    """:class:`CrossCorrelation` of one set of pairs, ``(d_sae,)`` float64."""
    metric = CrossCorrelation(image.d_sae, sync_on_compute=False).to(image.values.device)  # of these pairs alone
    metric.update(image, text)
    return metric.compute()


class PairScorer(NamedTuple):
    """Scores of how well an image and a text belong together; all that is fitted is fitted on training pairs."""

    weights: Tensor  #: ``(d_sae,)`` cross-modal correlation of each latent, negative and undefined ones set to 0
    #: ``(d,)`` mean of the unit-norm image embeddings, or None where embeddings are not scored
    mean_image: Tensor | None = None
    mean_text: Tensor | None = None  #: ``(d,)`` likewise for text

    @classmethod
    @torch.no_grad()
    def fit(cls, image: Codes, text: Codes, x_image: Tensor | None = None, x_text: Tensor | None = None) -> PairScorer:
        """Fit on training pairs: codes of both sides and, for ``clip_centred``, their ``(N, d)`` host embeddings."""
        weights = cross_correlation(image, text).nan_to_num(0).clamp(min=0).to(image.values.dtype)
        means = (None if x is None else normalize(x, dim=1).mean(0) for x in (x_image, x_text))
        return cls(weights, *means)

    def codes(self, image: Codes, text: Codes) -> dict[str, Tensor]:
        """``(N,)`` scores of N pairs from their codes: ``pair_code`` and ``pair_weighted``."""
        return {"pair_code": code_cosine(image, text), "pair_weighted": code_cosine(image, text, self.weights)}

    def embeddings(self, x_image: Tensor, x_text: Tensor) -> dict[str, Tensor]:
        """``(N,)`` scores of N pairs from host embeddings: ``clip`` (cosine) and ``clip_centred``.

        ``clip_centred`` removes each modality's mean of unit embeddings before the cosine.

        Raises:
            ValueError: The scorer was fitted without embeddings.
        """
        if self.mean_image is None or self.mean_text is None:
            raise ValueError("clip_centred needs a scorer fitted with x_image and x_text")
        a, b = normalize(x_image, dim=1), normalize(x_text, dim=1)
        return {
            "clip": (a * b).sum(1),
            "clip_centred": torch.cosine_similarity(a - self.mean_image, b - self.mean_text),
        }
