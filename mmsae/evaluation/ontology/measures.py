"""Do features follow a tree of classes? Lowest common hypernyms against a permutation null, purity, coverage.

The names of the measures are those of Olson et al. (arXiv 2505.15970, 2508.11277), whose formulas could not be read:
the definitions are this project's, see docs/how-to/evaluate.md. A feature stands for the set of classes on most of
whose images it fires; the claim is not that such sets lie low in the tree but that they lie lower than sets of equal
size with the classes exchanged at random.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmsae.evaluation.ontology.tree import Tree
from mmsae.metrics.concepts.class_means import as_codes
from mmsae.metrics.concepts.concepts import match_concepts, score_concepts
from mmsae.metrics.statistics import centred_ranks
from mmsae.types import IMAGE, Codes, InputError


class ClassSets(NamedTuple):
    """Which classes each feature stands for."""

    sets: Tensor  #: ``(F, C)`` bool; empty rows for features that were dropped
    rate: Tensor  #: ``(F, C)`` float64 share of each class's images on which the feature is above its threshold
    kept: Tensor  #: ``(F,)`` bool


def signed(x: Tensor, mean: Tensor) -> Tensor:
    """``(N, 2 d)`` positive and negative parts of channels about ``mean (d,)``.

    So raw channels, which fire everywhere, are judged by the same rule as codes: every channel counts as two features.
    """
    return torch.cat([x - mean, mean - x], 1).clamp(min=0)


@torch.no_grad()
def class_sets(
    features: Tensor | Codes,
    labels: Tensor,
    classes: int,
    threshold: float = 0.1,
    rate: float = 0.5,
    widest: float = 0.5,
    least: int = 20,
    chunk: int = 2048,
) -> ClassSets:
    """The classes of which most images are above a share of the feature's maximum.

    A feature ``(N,)`` fires above ``threshold`` of its largest value; a class belongs to the set where it fires on at
    least ``rate`` of the images. Features on more than ``widest`` of the classes or fewer than ``least`` images are
    dropped.

    Raises:
        InputError: A class has no image.
    """
    n = torch.bincount(labels, minlength=classes)
    if (n == 0).any():
        raise InputError(f"class {int((n == 0).nonzero()[0])} of {classes} has no image")
    codes = as_codes(features)
    z = codes.values.abs() if isinstance(features, Codes) else codes.values
    if codes.indices is None:
        counts = []  # (features, classes)
        for part in z.split(chunk, 1):
            on = (part > threshold * part.amax(0).clamp(min=0)).double()
            counts.append(torch.zeros(classes, on.shape[1], dtype=torch.float64).index_add_(0, labels, on).T)
        count = torch.cat(counts)
    else:
        width, ids = codes.d_sae, codes.indices
        most = z.new_zeros(width).scatter_reduce_(0, ids.flatten(), z.flatten(), "amax")
        at = (ids * classes + labels[:, None])[z > threshold * most[ids]]
        count = torch.bincount(at, minlength=width * classes).view(width, classes).double()
    share = count / n
    sets = share >= rate
    kept = (count.sum(1) >= least) & (sets.sum(1) <= widest * classes)
    return ClassSets(sets & kept[:, None], share, kept)


def placed(tree: Tree, sets: Tensor) -> dict[str, Any]:
    """Where sets of classes ``(F, C)``, none of them empty, lie in a tree.

    Returns:
        ``node``, ``height``, ``purity``: ``(F,)``; ``coverage``: share of internal nodes that are the lowest common
        ancestor of a set with purity of at least .5; ``coverage_f1``: mean over internal nodes of the best F1 of a set
        with the node's classes.
    """
    node, size = tree.lca(sets), sets.sum(1)
    purity = size / tree.sizes[node]
    inner = tree.internal
    hit = torch.isin(inner, node[purity >= 0.5])
    both = tree.member[inner] @ sets.to(tree.member).T
    f1 = 2 * both / (tree.sizes[inner, None] + size[None])
    shares = {"coverage": hit.double().mean().item(), "coverage_f1": f1.amax(1).double().mean().item()}
    return {"node": node, "height": tree.height[node], "purity": purity.double(), **shares}


@torch.no_grad()
def lch(tree: Tree, sets: Tensor, draws: int = 200, seed: int = 0) -> dict[str, Any]:
    """Height, purity and coverage of features' class sets, against the same sets with the classes exchanged at random.

    Exchanging classes keeps sizes and overlaps of the sets ``(F, C)``, so features that are alike do not count as
    independent evidence. Empty sets are left out. Sets of one class have height 0 whatever the tree: they are counted,
    but heights and purities are means over sets of two or more.

    Returns:
        ``height``, ``purity``, ``coverage``, ``coverage_f1`` as ``{"value", "null", "null_sd", "p"}`` (p: share of
        draws, with the observed one, at least as good: lower for heights, higher for the others); ``sizes``: numbers of
        sets of no class, one and more; ``heights``: number of the latter at each height.
    """
    many = sets[sets.sum(1) > 0]
    sizes = {"none": len(sets) - len(many), "one": int((many.sum(1) == 1).sum()), "more": int((many.sum(1) > 1).sum())}
    if not sizes["more"]:
        return {"sizes": sizes, "heights": []}

    def figures(s: Tensor) -> tuple[Tensor, Tensor]:
        at, wide = placed(tree, s), s.sum(1) > 1
        mean = [at[k][wide].double().mean().item() for k in ("height", "purity")]
        return torch.tensor([*mean, at["coverage"], at["coverage_f1"]], dtype=torch.float64), at["height"][wide]

    value, heights = figures(many)
    g = torch.Generator().manual_seed(seed)
    null = torch.stack([figures(many[:, torch.randperm(tree.classes, generator=g)])[0] for _ in range(draws)])
    good = torch.tensor([-1.0, 1, 1, 1], dtype=torch.float64)
    p = (1 + (null * good >= value * good - 1e-12).sum(0)) / (1 + draws)
    names = ("height", "purity", "coverage", "coverage_f1")
    stats = zip(names, value.tolist(), null.mean(0).tolist(), null.std(0).tolist(), p.tolist(), strict=True)
    out: dict[str, Any] = {n: {"value": v, "null": m, "null_sd": sd, "p": q} for n, v, m, sd, q in stats}
    return out | {"sizes": sizes, "heights": torch.bincount(heights, minlength=int(tree.height.max()) + 1).tolist()}


@torch.no_grad()
def tree_correlation(tree: Tree, means: Tensor, draws: int = 200, seed: int = 0) -> dict[str, float]:
    """Spearman correlation over pairs of classes of the cosine of their mean features with their nearness in the tree.

    Nearness is ``1 / (1 + path length)``; ``means (C, F)`` are permuted by class (Mantel's test), since pairs that
    share a class are not independent.

    Returns:
        ``value``, ``p``, ``null_sd`` and ``pairs``.
    """
    c = tree.classes
    i, j = torch.triu_indices(c, c, 1)
    unit = torch.nn.functional.normalize(means.double(), dim=1)
    near = tree.similarity()

    def centred(v: Tensor) -> Tensor:
        r = centred_ranks(v)
        return r / r.norm().clamp(min=1e-12)

    a = centred((unit @ unit.T)[i, j])
    ranks = torch.zeros(c, c, dtype=torch.float64)
    ranks[i, j] = centred(near[i, j])
    ranks = ranks + ranks.T
    value = a @ ranks[i, j]
    g = torch.Generator().manual_seed(seed)
    null = []
    for _ in range(draws):
        q = torch.randperm(c, generator=g)
        null.append(a @ ranks[q[i], q[j]])
    null = torch.stack(null)
    p = (1 + (null >= value - 1e-12).sum().item()) / (1 + draws)
    return {"value": value.item(), "p": p, "null_sd": null.std().item(), "pairs": len(i)}


@torch.no_grad()
def retrieval_coverage(
    tree: Tree, train: Codes, train_labels: Tensor, test: Codes, test_labels: Tensor, tau: float = 0.5, least: int = 20
) -> dict[str, Any]:
    """The feature and threshold of every internal node with the best F1 on training images, scored on others.

    The complement of coverage by class sets: a feature that fires on a third of one family's images finds it, but
    stands for no class. Nodes with fewer than ``least`` test images are left out; those with F1 ``tau`` are covered.

    Returns:
        ``f1``: mean over nodes; ``coverage``: share at ``tau``; ``by_depth``: ``{depth: (share, nodes)}``; ``nodes``.
    """
    inner = tree.internal[tree.sizes[tree.internal] < tree.classes]  # every image is below the root
    truth = tree.member[inner].bool().T
    enough = truth[test_labels].sum(0) >= least
    inner, truth = inner[enough], truth[:, enough]
    if not len(inner):
        return {"f1": float("nan"), "coverage": float("nan"), "by_depth": {}, "nodes": 0}
    match = match_concepts({IMAGE: train}, truth[train_labels])
    f1 = score_concepts(match, {IMAGE: test}, truth[test_labels])[0][IMAGE]
    depth = tree.depth[inner]
    by_depth = {
        int(d): ((f1[depth == d] >= tau).double().mean().item(), int((depth == d).sum())) for d in depth.unique()
    }
    covered = (f1 >= tau).double().mean().item()
    return {"f1": f1.mean().item(), "coverage": covered, "by_depth": by_depth, "nodes": len(inner)}


@torch.no_grad()
def lca_depth(tree: Tree, rows: Tensor, labels: Tensor, groups: Sequence[float] = ()) -> dict[str, Any]:
    """Mean depth of the lowest common ancestor of the pairs of a feature's top images (sae-for-vlm, 2504.02821).

    ``rows (F, n)`` are top images, -1 for none: features with fewer than n are left out. ``groups`` are the shares of
    the features, in order, that make Matryoshka's nested groups.

    Returns:
        ``depth``: ``(F,)`` float64, NaN where left out; ``mode``: ``(F,)`` int64, -1 where left out; ``mean``;
        ``groups``: mean depth per group; ``features``.
    """
    full = (rows >= 0).all(1)
    c = labels[rows.clamp(min=0)]
    i, j = torch.triu_indices(rows.shape[1], rows.shape[1], 1)
    pairs = tree.pair_depth[c[:, i], c[:, j]]
    depth = torch.where(full, pairs.double().mean(1), torch.nan)
    mode = torch.where(full, pairs.mode(1).values, -1)
    ends = (torch.tensor([0.0, *groups]).cumsum(0) * len(rows)).round().long().tolist()
    by_group = [depth[a:b].nanmean().item() for a, b in itertools.pairwise(ends)]
    means = {"mean": depth.nanmean().item(), "groups": by_group}
    return {"depth": depth, "mode": mode, **means, "features": int(full.sum())}
