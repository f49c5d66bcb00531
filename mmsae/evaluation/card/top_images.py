"""Head of the card about the images that features answer to most, and whether they are of one class."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mmsae.evaluation.options import PCA, RANDOM
from mmsae.evaluation.rows import row
from mmsae.evaluation.suite import NotApplicable, head
from mmsae.evaluation.suite_data import HeadResult, SuiteData
from mmsae.metrics.concepts.uniqueness import top_rows
from mmsae.metrics.statistics import bootstrap_mean, wilson
from mmsae.types import Codes

TOP, SAME = 9, 5  # images looked at, and how many of them of one class make a feature pure


class Purity(NamedTuple):
    """The classes of the top images of F features."""

    rows: Tensor  #: ``(F, n)`` rows of the n top images, -1 where a feature fires on fewer
    count: Tensor  #: ``(F,)`` how many of them are of their commonest class
    label: Tensor  #: ``(F,)`` that class, -1 where none of them has one

    @property
    def whole(self) -> Tensor:
        """``(F,)`` whether a feature has all n images."""
        return (self.rows >= 0).all(1)


def purity(features: Tensor | Codes, labels: Tensor, top: int = TOP) -> Purity:
    """The classes of the top images among N whose classes are ``labels (N,)``, -1 for none; ties take the lower."""
    rows = top_rows(features, top)
    classes = max(int(labels.max()), 0) + 1
    own = torch.where(rows >= 0, labels[rows.clamp(min=0)], -1)
    counts = torch.zeros(len(rows), classes + 1, dtype=torch.long)
    counts.scatter_add_(1, torch.where(own >= 0, own, classes), torch.ones_like(own))
    count, label = counts[:, :classes].max(1)
    return Purity(rows, count, torch.where(count > 0, label, -1))


@head
def top_images(data: SuiteData, set: str = "train", top: int = TOP, same: int = SAME) -> HeadResult:
    """Are the images that a feature answers to most of one class?"""
    f = data.features(set)
    if len(f.labels[f.labels >= 0].unique()) < 2:
        raise NotApplicable(f"{set} has images of fewer than two classes")
    rows, classes = [], len(f.names)
    for s in data.spaces([data.features("train"), f], controls=(RANDOM, PCA), kinds=("raw", "code")):
        p = purity(s.sets[1], f.labels, top)
        pure = p.whole & (p.count >= same)
        share = p.count[p.whole].double() / top
        named, width = len(p.label[pure].unique()), len(p.count)
        about = {"features": s.features, "control": s.control}
        for score, value, n, ends in (
            (f"purity of top {top}", share.mean(), len(share), bootstrap_mean(share)),
            (f"share with {same} of one class", pure.double().mean(), width, wilson(int(pure.sum()), width)),
            ("classes found", named / classes, classes, wilson(named, classes)),
        ):
            rows.append(row("top images", set, score, value=value, n=n, interval=ends, **about))
    note = (
        f"Purity: share of the {top} images with the largest values that are of their commonest class, mean over the "
        f"features that fire on as many (n). A class is found where {same} of the {top} images of some feature are of "
        f"it. The images are {f.n:,} of {set}; raw channels and components count by their positive values."
    )
    return HeadResult(rows, notes=[note])
