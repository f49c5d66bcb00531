"""How well a confidence tells in-distribution samples from others: AUROC, both FPR95s by name, both AUPRs.

A confidence is larger for samples that look more in-distribution (the rule of OpenOOD, arXiv 2306.09301). The curves
keep every threshold: leaving collinear points out moves FPR95 where scores tie.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from mmsae.metrics.statistics import auroc
from mmsae.types import InputError

TPR = 0.95


class OODMetrics(NamedTuple):
    """Figures of one detector on one pair of sets."""

    auroc: float  #: Chance that an ID sample has the higher confidence, ties counted half
    #: Share of ID samples flagged when at least 95% of the OOD samples are (OpenOOD's FPR@95)
    fpr95_ood_positive: float
    fpr95_id_positive: float  #: Share of OOD samples accepted when at least 95% of the ID samples are (older papers')
    aupr_in: float  #: Area under precision over recall, ID as the positive class, by trapezoid (not average precision)
    aupr_out: float  #: The same with OOD as the positive class. Equal scores everywhere give .75 on balanced sets.
    n_id: int  #: ID samples
    n_ood: int  #: OOD samples


class Curve(NamedTuple):
    """Counts at every threshold, strictest first; all float64 ``(T,)``."""

    tp: Tensor  #: Positives taken for positive
    fp: Tensor  #: Negatives taken for positive


def curve(positive: Tensor, negative: Tensor) -> Curve:
    """The curve of scores that are high for positives; one point per distinct score."""
    scores = torch.cat([positive, negative]).double()
    is_positive = torch.zeros(len(scores), dtype=torch.float64, device=scores.device)
    is_positive[: len(positive)] = 1
    value, at = scores.unique(return_inverse=True)
    zero = torch.zeros_like(value)
    tp, fp = zero.index_add(0, at, is_positive), zero.index_add(0, at, 1 - is_positive)
    return Curve(tp.flip(0).cumsum(0), fp.flip(0).cumsum(0))


def roc(id_conf: Tensor, ood_conf: Tensor) -> tuple[Tensor, Tensor]:
    """``(fpr, tpr)`` with OOD as the positive class, from (0, 0) to (1, 1)."""
    c = curve(-_checked(ood_conf, "OOD"), -_checked(id_conf, "ID"))
    return tuple(torch.cat([t.new_zeros(1), t / t[-1]]) for t in (c.fp, c.tp))


def fpr_at(c: Curve, tpr: float = TPR) -> float:
    """False positive rate at the first threshold whose true positive rate is at least ``tpr``."""
    first = int((c.tp / c.tp[-1] >= tpr).nonzero()[0, 0])
    return (c.fp[first] / c.fp[-1]).item()


def aupr(c: Curve) -> float:
    """Area under precision over recall by the trapezoid, from (recall 0, precision 1)."""
    one = c.tp.new_ones(1)
    precision, recall = torch.cat([one, c.tp / (c.tp + c.fp)]), torch.cat([0 * one, c.tp / c.tp[-1]])
    return torch.trapezoid(precision, recall).item()


def _checked(conf: Tensor, name: str) -> Tensor:
    conf = torch.as_tensor(conf).detach().double().flatten()
    bad = int(conf.isnan().sum())
    if not len(conf) or bad:
        raise InputError(f"{name} has {len(conf)} scores, {bad} of them NaN: a curve needs at least 1 and none")
    return conf


def ood_metrics(id_conf: Tensor, ood_conf: Tensor) -> OODMetrics:
    """Figures of confidences ``id_conf (n,)`` and ``ood_conf (m,)``, larger = more in-distribution.

    Raises:
        InputError: No score on a side, or NaN among them.
    """
    a, b = _checked(id_conf, "ID"), _checked(ood_conf, "OOD").to(id_conf.device)
    out, inside = curve(-b, -a), curve(a, b)
    return OODMetrics(auroc(a, b), fpr_at(out), fpr_at(inside), aupr(inside), aupr(out), len(a), len(b))


def auroc_interval(id_conf: Tensor, ood_conf: Tensor, z: float = 1.959964) -> tuple[float, float]:
    """95% interval of the AUROC by DeLong's variance (Biometrics 1988), cut to [0, 1]."""
    a, b = _checked(id_conf, "ID"), _checked(ood_conf, "OOD")
    wins_a, wins_b = _placement(a, b), 1 - _placement(b, a)
    var = sum(w.var().item() / len(w) if len(w) > 1 else 0.0 for w in (wins_a, wins_b))
    value = wins_a.mean().item()
    return max(0.0, value - z * var**0.5), min(1.0, value + z * var**0.5)


def _placement(x: Tensor, other: Tensor) -> Tensor:
    """``(len(x),)`` share of ``other`` below each x, ties counted half."""
    s = other.sort().values
    return (torch.searchsorted(s, x) + torch.searchsorted(s, x, right=True)).double() / (2 * len(s))


class OODScores(Metric):
    """Figures of :func:`ood_metrics` from streams of confidences; the same under any number of ranks.

    Confidences are counted on a fixed grid of ``conf / (scale + |conf|)``; those of one cell tie. States are float64
    counts, summed over ranks.

    Args:
        scale: A typical size of the confidence; cells are ``2 scale / bins`` wide near 0.
        bins: Cells of the grid.
    """

    full_state_update = False

    def __init__(self, scale: float = 1.0, bins: int = 65_536, **kwargs):
        super().__init__(**kwargs)
        self.scale, self.bins = scale, bins
        for name in ("id", "ood"):
            self.add_state(name, torch.zeros(bins, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, conf: Tensor, ood: bool) -> None:
        """Add confidences ``(n,)`` of ID samples, or of OOD samples."""
        conf = conf.detach().double()
        cell = ((conf / (self.scale + conf.abs()) + 1) / 2 * self.bins).long().clamp(0, self.bins - 1)
        name = "ood" if ood else "id"
        setattr(self, name, getattr(self, name) + torch.bincount(cell, minlength=self.bins))

    def compute(self) -> OODMetrics | None:
        """The figures; None where one side has no sample."""
        if not self.id.sum() or not self.ood.sum():
            return None
        inside, out = _cumulated(self.id, self.ood), _cumulated(self.ood.flip(0), self.id.flip(0))
        area = torch.trapezoid(*(torch.cat([t.new_zeros(1), t / t[-1]]) for t in (inside.tp, inside.fp))).item()
        counts = (int(self.id.sum()), int(self.ood.sum()))
        return OODMetrics(area, fpr_at(out), fpr_at(inside), aupr(inside), aupr(out), *counts)


def _cumulated(positive: Tensor, negative: Tensor) -> Curve:
    """Counts from the last cell to the first, empty cells left out."""
    some = (positive + negative).flip(0) > 0
    return Curve(*(t.flip(0)[some].cumsum(0) for t in (positive, negative)))
