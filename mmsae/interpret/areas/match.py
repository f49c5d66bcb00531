"""Which area here is the same thing as which area there, and why.

Energies are those of MESA (arXiv 2401.16741): of a pair itself, and of the best pair of their children, parents and
neighbours. Its graph cut and its point matcher are left out; descriptors are of codes (reconstructed).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from mmsae.interpret.areas.areas import AreaGraph, Areas, area_graph

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

OWN = 10.0  # weight of a pair's own energy; each kind of relatives has 1


@dataclass(frozen=True)
class MatchOptions:
    """How areas are matched."""

    assign: Literal["one", "mutual"] = "one"
    """``one``: one to one with the least sum of energies (Hungarian); ``mutual``: pairs that are each other's best."""
    accept: float = 0.5
    """Pairs of larger energy are no pairs."""
    ratio: float = 1.0
    """Of ``mutual``: the energy may be at most so many times that of the second best; below 1 it is a test for clear
    pairs."""
    relatives: bool = True
    """Whether children, parents and neighbours count."""


class AreaMatch(NamedTuple):
    """Pairs of areas of two images, and the figures of all pairs."""

    pairs: np.ndarray  #: ``(M, 2) int64`` accepted pairs, by the first
    energy: (
        np.ndarray
    )  #: ``(A1, A2) float64`` 0 for equal areas among equal relatives, 1 for areas without anything in common
    similarity: np.ndarray  #: ``(A1, A2) float64`` cosine of the descriptors
    #: ``(M,) float64`` how far the second best energy of the first area lies above the pair's; below 0 where the
    #: assignment took another than the best. Near 0 it was arbitrary, as with repeated objects.
    margin: np.ndarray


def similarities(a: csr_matrix, b: csr_matrix) -> np.ndarray:
    """``(A1, A2) float64`` cosines of unit rows."""
    return (a.astype(np.float64) @ b.astype(np.float64).T).toarray().clip(0, 1)


def energies(own: np.ndarray, first: AreaGraph, second: AreaGraph) -> np.ndarray:
    """``(A1, A2)`` energies of pairs with their relatives, from those of the pairs themselves.

    A kind of relatives that one of the two lacks does not count, also not in the sum of the weights, so that lone areas
    look no better than others.
    """
    total, weight = OWN * own, np.full(own.shape, OWN)
    kinds = ((first.inside.T, second.inside.T), (first.inside, second.inside), (first.adjacent, second.adjacent))
    for left, right in kinds:
        least = _least(_least(own, left).T, right).T
        known = np.isfinite(least)
        total += np.where(known, least, 0)
        weight += known
    return total / weight


def _least(values: np.ndarray, relatives: np.ndarray) -> np.ndarray:
    """``(A, B)``: for each of A the least over its relatives ``(A, A')`` of ``values (A', B)``; inf without any."""
    out = np.full((len(relatives), values.shape[1]), np.inf)
    area, other = np.nonzero(relatives)
    if len(area):
        some, start = np.unique(area, return_index=True)
        out[some] = np.minimum.reduceat(values[other], start, axis=0)
    return out


def match_areas(
    first: Areas, second: Areas, options: MatchOptions = MatchOptions(), similarity: np.ndarray | None = None
) -> AreaMatch:
    """Match the areas of two images.

    Args:
        first: Those of one.
        second: Those of the other; its grid may have another shape.
        options: How.
        similarity: ``(A1, A2)`` other similarities in [0, 1] than those of the codes, such as :func:`dense_similarity`;
            the pairs are still explained by codes.
    """
    s = similarities(first.descriptor, second.descriptor) if similarity is None else np.asarray(similarity, np.float64)
    energy = 1 - s
    if options.relatives:
        energy = energies(energy, area_graph(first), area_graph(second))
    pairs = _one_to_one(energy, options.accept) if options.assign == "one" else _mutual(energy, options.ratio)
    pairs = pairs[energy[pairs[:, 0], pairs[:, 1]] < options.accept]
    others = energy[pairs[:, 0]].copy()
    others[np.arange(len(pairs)), pairs[:, 1]] = np.inf
    second_best = others.min(1, initial=1.0)
    return AreaMatch(pairs, energy, s, second_best - energy[pairs[:, 0], pairs[:, 1]])


def _one_to_one(energy: np.ndarray, accept: float) -> np.ndarray:
    """Pairs that are not accepted cost all the same, so that no good pair is given up for a less bad one."""
    from scipy.optimize import linear_sum_assignment

    return np.stack(linear_sum_assignment(np.minimum(energy, accept)), 1)


def _mutual(energy: np.ndarray, ratio: float) -> np.ndarray:
    """Pairs that are each other's best, and clearly where ``ratio`` is below 1."""
    if not energy.size:
        return np.zeros((0, 2), int)
    to, back = energy.argmin(1), energy.argmin(0)
    i = np.flatnonzero(back[to] == np.arange(len(to)))
    if ratio < 1 and energy.shape[1] > 1:
        two = np.partition(energy[i], 1, axis=1)[:, :2]
        i = i[two[:, 0] < ratio * two[:, 1]]
    return np.stack([i, to[i]], 1)


def dense_similarity(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """``(A1, A2)`` cosines, none below 0, of dense descriptors ``(A1, d)`` and ``(A2, d)``: see :func:`pool_dense`."""
    unit = [v / np.maximum(np.linalg.norm(v, axis=1, keepdims=True), 1e-12) for v in (first, second)]
    return (unit[0].astype(np.float64) @ unit[1].T).clip(0, 1)


def pool_dense(areas: Areas, features: np.ndarray) -> np.ndarray:
    """``(A, d)`` means of patch features ``(rows, cols, d)`` over areas."""
    from mmsae.interpret.areas.areas import patches_of

    inside = patches_of(areas.masks, areas.shape, *features.shape[:2])
    return (inside @ features.reshape(-1, features.shape[2])) / np.maximum(np.diff(inside.indptr), 1)[:, None]


class Reason(NamedTuple):
    """One latent's part in the similarity of two areas."""

    latent: int
    name: str  #: Empty where it has none
    share: float  #: What it adds to the cosine


def explain(
    first: Areas, i: int, second: Areas, j: int, names: Mapping[int, str] | None = None, most: int | None = None
) -> list[Reason]:  # fmt: skip
    """Why two areas match: the latents that both have, by their parts in the cosine, which these sum to."""
    shared = first.descriptor[i].astype(np.float64).multiply(second.descriptor[j].astype(np.float64)).tocsr()
    order = np.argsort(-shared.data, kind="stable")[:most]
    return [
        Reason(int(k), (names or {}).get(int(k), ""), float(v))
        for k, v in zip(shared.indices[order], shared.data[order], strict=True)
    ]
