"""Do the samples that a feature answers to look alike to an independent encoder? Exact, in one streaming pass.

Monosemanticity score of Pach et al. (arXiv 2504.02821): with activations ``a`` scaled to [0, 1] per feature over the
samples and unit embeddings ``e`` of an encoder that is not the host,
``MS = sum_{n<m} a_n a_m <e_n, e_m> / sum_{n<m} a_n a_m``. The published code loops over pairs; the closed form
``(|sum a_n e_n|^2 - sum a_n^2) / ((sum a_n)^2 - sum a_n^2)`` is equal.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize
from torchmetrics import Metric

from mmsae.kernels import sparse_scatter
from mmsae.metrics.concepts.class_means import as_codes
from mmsae.types import Codes, InputError

KINDS = ("scored", "dead", "constant", "single")
BOUNDS = ({"max": 0.0}, {"min": 0.0})  # of the least and of the largest value, where one of them is 0


class MonosemanticityScores(NamedTuple):
    """What :class:`Monosemanticity` computes."""

    score: Tensor  #: ``(F,)`` float64; NaN where it is undefined
    #: ``(F,)`` int64 positions in ``KINDS``: ``dead`` is 0 on every sample, ``constant`` another value on every
    #: sample, ``single`` above its minimum on one sample only; these three have no score
    kind: Tensor
    chance: float  #: Mean cosine of all pairs of samples: the score of a feature that knows nothing
    samples: int  #: Number of samples

    def summary(self) -> dict[str, float]:
        """Mean and deviation over the scored features, ``above_chance`` (mean minus chance), and the counts."""
        on = self.score[self.kind == 0]
        mean = on.mean().item() if len(on) else float("nan")
        return {
            "mean": mean,
            "sd": on.std().item() if len(on) > 1 else float("nan"),
            "chance": self.chance,
            "above_chance": mean - self.chance,
            **{name: int((self.kind == i).sum()) for i, name in enumerate(KINDS)},
            "samples": self.samples,
        }


class Monosemanticity(Metric):
    """Streaming monosemanticity of every feature; float64 sums, equal over batches and ranks.

    Scaling to [0, 1] needs the extremes of all samples, but the sums of scaled values follow from sums of raw ones, so
    one pass is enough. Embeddings (of ``width``) should come from another encoder than the features (else the score is
    circular), on samples without near-duplicates (which raise it).
    """

    full_state_update = False

    def __init__(self, features: int, width: int, **kwargs):
        super().__init__(**kwargs)
        zero = torch.zeros(features, dtype=torch.float64)
        self.add_state("n", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(width, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("weighted", torch.zeros(features, width, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("sum_a", zero.clone(), dist_reduce_fx="sum")
        self.add_state("sum_aa", zero.clone(), dist_reduce_fx="sum")
        self.add_state("low", zero + torch.inf, dist_reduce_fx="min")
        self.add_state("high", zero - torch.inf, dist_reduce_fx="max")

    @torch.no_grad()
    def update(self, features: Tensor | Codes, embeddings: Tensor) -> None:
        """Add a batch: ``(N, F)`` activations of any sign, or codes, and the judge's embeddings; normalised here.

        Raises:
            InputError: Different numbers of rows.
        """
        codes = as_codes(features)
        if codes.n != len(embeddings):
            raise InputError(f"{codes.n} rows of features for {len(embeddings)} embeddings of the judge")
        if not codes.n:
            return
        a, e = codes.values.detach().double(), normalize(embeddings.detach().double(), dim=1)
        self.n = self.n + len(a)
        self.total = self.total + e.sum(0)
        if codes.indices is None:
            weighted, low, high, sums = a.T @ e, a.amin(0), a.amax(0), [a.sum(0), a.square().sum(0)]
        else:
            weighted = sparse_scatter(a, codes.indices, e, codes.d_sae)
            at, flat, zero = codes.indices.reshape(-1), a.reshape(-1), a.new_zeros(codes.d_sae)
            sums = [zero.index_add(0, at, v) for v in (flat, flat.square())]
            absent = torch.bincount(at, minlength=codes.d_sae) < len(a)  # from a row, where it is 0
            ends = [zero.scatter_reduce(0, at, flat, how, include_self=False) for how in ("amin", "amax")]
            low, high = (torch.where(absent, end.clamp(**bound), end) for end, bound in zip(ends, BOUNDS, strict=True))
        self.weighted += weighted  # in place: F times the width
        self.sum_a, self.sum_aa = (own + new for own, new in zip((self.sum_a, self.sum_aa), sums, strict=True))
        self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)

    def scaled(self) -> tuple[Tensor, Tensor, Tensor]:
        """Sums over samples of activations scaled to [0, 1] ``(F,)``, of their squares, and of ``a e (F, width)``."""
        n, span = self.n.double(), self.high - self.low
        safe = torch.where(span > 0, span, 1.0)
        first = (self.sum_a - n * self.low) / safe
        second = (self.sum_aa - 2 * self.low * self.sum_a + n * self.low.square()) / safe.square()
        return first, second, (self.weighted - self.low[:, None] * self.total) / safe[:, None]

    def compute(self) -> MonosemanticityScores:
        """Scores over everything that all ranks have seen."""
        n, span = self.n.double(), self.high - self.low
        first, second, g = self.scaled()
        pairs = first.square() - second
        # one sample at 1 and the rest at 0 leaves 0, up to the rounding of sums whose terms were of the size of low
        floor = 1e-12 * n * (1 + (self.low / torch.where(span > 0, span, 1.0)).square())
        kind = torch.where(pairs > floor, 0, KINDS.index("single"))
        flat = torch.where(self.high == 0, KINDS.index("dead"), KINDS.index("constant"))
        kind = torch.where(span > 0, kind, flat)
        score = torch.where(kind == 0, (g.square().sum(1) - second) / pairs, torch.nan)
        chance = (self.total.square().sum() - n) / (n * n - n)
        return MonosemanticityScores(score, kind, chance.item(), int(self.n))


def cross_monosemanticity(image: Monosemanticity, text: Monosemanticity) -> Tensor:
    """``(F,)`` float64: are the images and the texts that a feature answers to alike (MMS, arXiv 2601.20028)?

    ``MMS = sum_{a,b} a_a b_b <e_a, e_b> / sum_{a,b} a_a b_b`` over all images a and texts b, activations scaled to
    [0, 1] in each modality, with embeddings of a judge that has both in one space and is not the host. Images and texts
    need not be pairs. 0 where a feature varies on one modality alone (it is split), NaN where it does on none. What
    all ranks have seen counts. The form is [R].

    Args:
        image: Has seen the images.
        text: Has seen the texts, with features in the same order.

    Raises:
        InputError: Another number of features or width of embeddings.
    """
    if image.weighted.shape != text.weighted.shape:
        raise InputError(
            f"images have {tuple(image.weighted.shape)} features and widths of embeddings, "
            f"texts {tuple(text.weighted.shape)}: they must be equal"
        )
    with image.sync_context(), text.sync_context():
        (a, _, g), (b, _, h) = image.scaled(), text.scaled()
        varies = [m.high > m.low for m in (image, text)]
    both = varies[0] & varies[1]
    score = torch.where(both, (g * h).sum(1) / torch.where(both, a * b, 1.0), 0.0)
    return torch.where(varies[0] | varies[1], score, torch.nan)


@torch.no_grad()
def monosemanticity(features: Tensor | Codes, embeddings: Tensor, chunk: int = 4096) -> MonosemanticityScores:
    """:class:`Monosemanticity` of features that are at hand, ``chunk`` rows at a time."""
    codes = as_codes(features)
    if codes.n != len(embeddings):
        raise InputError(f"{codes.n} rows of features for {len(embeddings)} embeddings of the judge")
    metric = Monosemanticity(codes.d_sae, embeddings.shape[1]).to(codes.values.device)
    for lo in range(0, codes.n, chunk):
        part = slice(lo, lo + chunk)
        metric.update(codes.rows(part), embeddings[part])
    return metric.compute()
