"""Groups of items by some of their concepts, described by what is more frequent in a group than in all items."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mmsae.interpret.analyse.corpora import counts
from mmsae.interpret.analyse.options import Clustering
from mmsae.metrics.concepts.query import named, parse
from mmsae.types import InputError

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

NEIGHBOURS = 0.5  # width of the similarity of spectral clustering, in median distances


class Clusters(NamedTuple):
    """Groups of items."""

    of: np.ndarray  #: ``(n,)`` the cluster of each item, the largest cluster first; -1: it has none of the concepts
    distance: np.ndarray  #: ``(n,)`` from its cluster's mean; NaN of those without one
    latents: np.ndarray  #: The concepts that items were compared by
    lift: np.ndarray  #: ``(clusters, d_sae)`` how much more frequent each concept is in a cluster than in all items

    def describe(self, present: csr_matrix, names: Mapping[int, str], least: int, most: int = 12) -> list[list[dict]]:
        """What distinguishes each cluster: concepts in at least ``least`` of its items, by share times log lift."""
        everywhere = counts(present) / max(present.shape[0], 1)
        out = []
        for c, lift in enumerate(self.lift):
            inside = present[self.of == c]
            share = counts(inside) / max(inside.shape[0], 1)
            weight = share * np.log(np.maximum(lift, 1e-9))
            weight[counts(inside) < least] = -np.inf
            order = [j for j in np.argsort(-weight, kind="stable")[:most].tolist() if weight[j] > 0]
            out.append([
                {"latent": j, "name": names.get(j, ""), "share": float(share[j]), "everywhere": float(everywhere[j]),
                 "lift": float(lift[j])} for j in order
            ])  # fmt: skip
        return out


def chosen_latents(
    given: Clustering, present: csr_matrix, labels: np.ndarray, names: Mapping[int, str], least: int
) -> np.ndarray:
    """The concepts that items are compared by: those named, those with lift in a class, or all that fire often enough.

    Args:
        given: Says which.
        present: ``(n, d_sae)`` 0 and 1.
        labels: ``(n,)`` classes of items.
        names: Names of latents.
        least: Items on which a latent must fire.

    Raises:
        InputError: A name or class that is not there, or no concept is left.
    """
    n_on = counts(present)
    if given.concepts and given.label:
        raise InputError("concepts and label both say which concepts items are compared by: give one of them")
    if given.concepts:
        found: list[int] = []
        for text in given.concepts:
            leaf = parse(text) if text.startswith("#") else None
            found += leaf.latents() if leaf else named(text, names)
        if wrong := [j for j in found if j >= len(n_on)]:
            raise InputError(f"concepts: there is no latent #{wrong[0]}: the SAE has {len(n_on)}")
    elif given.label:
        inside = labels == given.label
        if not inside.any():
            like = [c for c in dict.fromkeys(labels.tolist()) if c and fnmatch.fnmatch(c.lower(), given.label.lower())]
            raise InputError(f"no item has the label {given.label!r}{f'; there is {like[0]}' if like else ''}")
        share = counts(present[inside]) / inside.sum()
        found = np.flatnonzero(share >= given.lift * n_on / present.shape[0]).tolist()
    else:
        found = list(range(len(n_on)))
    latents = np.array(sorted({j for j in found if n_on[j] >= least}), int)
    if not len(latents):
        raise InputError(f"none of the {len(found)} concepts asked for is in at least {least} items")
    return latents


def cluster(
    codes: csr_matrix, present: csr_matrix, latents: np.ndarray, given: Clustering = Clustering(), seed: int = 0
) -> Clusters:
    """Group items by some of their concepts.

    Args:
        codes: ``(n, d_sae)`` values.
        present: ``(n, d_sae)`` 0 and 1.
        latents: Concepts to compare by.
        given: How.
        seed: Of starts and of the items that are compared in pairs.

    Raises:
        InputError: Fewer items than clusters, or k-means of what is no distance of values.
    """
    from sklearn.cluster import KMeans
    from sklearn.metrics import pairwise_distances

    if given.method == "kmeans" and given.metric == "jaccard":
        raise InputError("kmeans has means of values: metric must be l2, or method spectral or agglomerative")
    part = present[:, latents]
    has = np.flatnonzero(np.diff(part.indptr))
    if len(has) < given.clusters:
        raise InputError(f"{given.clusters} clusters are asked for, of {len(has)} items with any of the concepts")
    x = part[has].astype(np.float64) if given.metric == "jaccard" else _scaled(codes[:, latents])[has]
    if given.method == "kmeans":
        own = KMeans(given.clusters, n_init=4, random_state=seed).fit_predict(x)
    else:
        some = np.arange(len(has))
        if len(has) > given.items:
            some = np.sort(np.random.default_rng(seed).permutation(len(has))[: given.items])
        dense = x[some].toarray()
        if given.metric == "jaccard":
            distance = pairwise_distances(dense.astype(bool), metric="jaccard")
        else:
            distance = pairwise_distances(dense)
        found = _grouped(distance, given, seed)
        own = _nearest(x, _means(x[some], found, given.clusters))[0]
        own[some] = found
    order = np.argsort(-np.bincount(own, minlength=given.clusters), kind="stable")
    own = np.argsort(order)[own]
    of, distance = np.full(codes.shape[0], -1), np.full(codes.shape[0], np.nan)
    means = _means(x, own, given.clusters)
    of[has], distance[has] = own, _nearest(x, means, own)[1]
    return Clusters(of, distance, latents, _lift(present, of, given.clusters))


def _grouped(distance: np.ndarray, given: Clustering, seed: int) -> np.ndarray:
    from sklearn.cluster import AgglomerativeClustering, SpectralClustering

    if given.method == "agglomerative":
        return AgglomerativeClustering(given.clusters, metric="precomputed", linkage="average").fit_predict(distance)
    width = NEIGHBOURS * max(float(np.median(distance)), 1e-9)
    near = np.exp(-(distance**2) / (2 * width**2))
    return SpectralClustering(given.clusters, affinity="precomputed", random_state=seed).fit_predict(near)


def _scaled(codes: csr_matrix) -> csr_matrix:
    """Values with each latent's largest at 1, so that no latent counts for its scale."""
    from scipy.sparse import diags

    most = np.asarray(abs(codes).max(0).todense(), np.float64).ravel()
    return (codes.astype(np.float64) @ diags(1 / np.where(most > 0, most, 1))).tocsr()


def _means(x: csr_matrix, own: np.ndarray, k: int) -> np.ndarray:
    from scipy.sparse import csr_matrix

    member = csr_matrix((np.ones(len(own)), (own, np.arange(len(own)))), shape=(k, len(own)))
    return np.asarray((member @ x).todense()) / np.maximum(np.bincount(own, minlength=k), 1)[:, None]


def _nearest(x: csr_matrix, means: np.ndarray, own: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The nearest mean of every row and how far it is; with ``own``, how far that one is."""
    square = np.asarray(x.multiply(x).sum(1)) - 2 * (x @ means.T) + (means**2).sum(1)
    own = square.argmin(1) if own is None else own
    return own, np.sqrt(np.maximum(np.take_along_axis(square, own[:, None], 1)[:, 0], 0))


def _lift(present: csr_matrix, of: np.ndarray, k: int) -> np.ndarray:
    inside = np.stack([counts(present[of == c]) / max((of == c).sum(), 1) for c in range(k)])
    everywhere = counts(present) / max(present.shape[0], 1)
    return np.divide(inside, everywhere, out=np.zeros_like(inside), where=everywhere > 0)


def agreement(of: np.ndarray, labels: list[str]) -> dict[str, Any]:
    """How far clusters are the classes of the items that have one: adjusted Rand index and mutual information."""
    from sklearn.metrics import adjusted_mutual_info_score, adjusted_rand_score

    own = np.array(labels)
    use = (own != "") & (of >= 0)
    if len(set(own[use])) < 2:
        return {}
    return {
        "items": int(use.sum()),
        "classes": len(set(own[use])),
        "adjusted_rand": float(adjusted_rand_score(own[use], of[use])),
        "adjusted_mutual_information": float(adjusted_mutual_info_score(own[use], of[use])),
    }
