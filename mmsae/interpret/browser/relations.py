"""How latents and samples relate: neighbours by atoms and by co-activation, bridges between modalities, agreement of
image and text, labels.

What grows with the square of what fires together is counted on a sample of items, or without the commonest latents, so
that it stays within :data:`BUDGET` products.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from mmsae.interpret.browser.segments import best_of_rows
from mmsae.interpret.evidence.folder import Evidence, SparseRows

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

BUDGET = 3e8  # multiplications of sparse products
CELLS = 1.6e7  # of products at a time, 200 MB where they are sparse
LEAST = 3  # items on which two latents must fire together


def blocks(rows: int, width: int) -> Iterator[slice]:
    """Slices of rows whose products with ``width`` others have at most :data:`CELLS` cells."""
    size = max(16, int(CELLS / max(width, 1)))
    return (slice(lo, min(lo + size, rows)) for lo in range(0, rows, size))


def unit_rows(atoms: np.ndarray) -> np.ndarray:
    """Rows of length 1; rows of zeros stay."""
    return atoms / np.maximum(np.linalg.norm(atoms, axis=1, keepdims=True), 1e-12)


def nearest_rows(
    rows: np.ndarray, others: np.ndarray, k: int, same: bool = False, allowed: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The k rows of ``others`` with the largest cosine, best first: ``(place, cosine)``, both ``(n, k)``.

    Args:
        rows: ``(n, d)``.
        others: ``(m, d)``.
        k: How many; fewer where there are fewer.
        same: Both are the same rows; none is its own neighbour.
        allowed: ``(m,)`` bool which of them count. Default: all.
    """
    rows, others = unit_rows(np.asarray(rows, np.float32)), unit_rows(np.asarray(others, np.float32))
    k = min(k, len(others) - same)
    place, cosine = np.full((len(rows), k), -1, np.int32), np.zeros((len(rows), k), np.float32)
    for part in blocks(len(rows), len(others)):
        some = rows[part] @ others.T
        if allowed is not None:
            some[:, ~allowed] = -2
        if same:
            some[np.arange(len(some)), part.start + np.arange(len(some))] = -2
        best = np.argpartition(-some, k - 1, 1)[:, :k] if k else np.empty((len(some), 0), int)
        value = np.take_along_axis(some, best, 1)
        order = np.lexsort((best, -value), 1)
        best, value = np.take_along_axis(best, order, 1), np.take_along_axis(value, order, 1)
        place[part], cosine[part] = np.where(value > -1.5, best, -1), value
    return place, cosine


def sample_rows(codes: SparseRows, seed: int, budget: float = BUDGET, other: SparseRows | None = None) -> np.ndarray:
    """Rows, drawn at random, whose products of each entry with each stay within a budget; all rows where they do."""
    size = np.diff(np.asarray(codes.start)).astype(float)
    cost = size * (size if other is None else np.diff(np.asarray(other.start)))
    order = np.random.default_rng(seed).permutation(codes.n)
    return np.sort(order[np.cumsum(cost[order]) <= budget])


def coactive(codes: csr_matrix, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Latents that fire on the same items, by Jaccard: ``(latent, share)``, both ``(d_sae, k)``."""
    on = codes.astype(bool).astype(np.float32)
    count = np.asarray(on.sum(0)).ravel()
    by_latent = on.T.tocsr()
    columns, values = [], []
    for part in blocks(on.shape[1], on.shape[1]):
        both = (by_latent[part] @ on).tocsr()
        row = part.start + np.repeat(np.arange(both.shape[0]), np.diff(both.indptr))
        share = both.data / np.maximum(count[row] + count[both.indices] - both.data, 1)
        both.data = np.where((both.data >= LEAST) & (row != both.indices), share, 0)
        c, v = best_of_rows(both, k)
        columns.append(c)
        values.append(v)
    return np.concatenate(columns), np.concatenate(values)


def bridges(image: csr_matrix, text: csr_matrix, atoms: np.ndarray | None, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Text latents that fire in the captions of the images on which a latent fires.

    The mean over pairs of ``z_image z_text^T``, times the cosine of the two atoms where atoms are known (arXiv
    2504.11695), as shares of the row's sum: ``(latent, share)``, both ``(d_sae, k)``; a latent may be its own bridge.
    """
    unit = None if atoms is None else unit_rows(np.asarray(atoms, np.float32))
    by_latent, columns, values = abs(image).T.tocsr(), [], []
    text = abs(text).tocsr()
    for part in blocks(image.shape[1], text.shape[1]):
        both = (by_latent[part] @ text).tocsr()
        row = np.repeat(np.arange(both.shape[0]), np.diff(both.indptr))
        if unit is not None:
            cosine = np.empty(len(row), np.float32)
            for at in range(0, len(row), 65536):
                some = slice(at, at + 65536)
                cosine[some] = np.einsum("nd,nd->n", unit[part.start + row[some]], unit[both.indices[some]])
            both.data = both.data * np.maximum(cosine, 0)
        total = np.maximum(np.asarray(both.sum(1)).ravel(), 1e-30)
        both.data = (both.data / total[row]).astype(np.float32)
        c, v = best_of_rows(both, k)
        columns.append(c)
        values.append(v)
    return np.concatenate(columns), np.concatenate(values)


def similar_samples(codes: csr_matrix, k: int, budget: float = BUDGET) -> tuple[np.ndarray, np.ndarray]:
    """Items with the most similar codes, by cosine: ``(row, cosine)``, both ``(m, k)``.

    Latents count by their rarity, ``log(m / df)``, and the commonest ones not at all where the products of all would
    pass the budget.
    """
    from scipy.sparse import diags

    m = codes.shape[0]
    count = np.bincount(codes.indices, minlength=codes.shape[1])
    order = np.argsort(count, kind="stable")
    kept = np.zeros(len(count), bool)
    kept[order[np.cumsum(count[order].astype(float) ** 2) <= budget]] = True
    weight = np.where(kept & (count > 0), np.log(max(m, 2) / np.maximum(count, 1)), 0)
    x = (abs(codes) @ diags(weight)).tocsr()
    x.eliminate_zeros()
    norm = np.sqrt(np.asarray(x.multiply(x).sum(1)).ravel())
    x = (diags(1 / np.maximum(norm, 1e-12)) @ x).tocsr().astype(np.float32)
    turned, columns, values = x.T.tocsr(), [], []
    for part in blocks(m, m):
        both = (x[part] @ turned).tocsr()
        row = part.start + np.repeat(np.arange(both.shape[0]), np.diff(both.indptr))
        both.data = np.where(row == both.indices, 0, both.data)
        c, v = best_of_rows(both, k)
        columns.append(c)
        values.append(v)
    return (np.concatenate(columns), np.concatenate(values)) if columns else (np.empty((0, k)), np.empty((0, k)))


def agreement(evidence: Evidence, block: int = 1024) -> np.ndarray:
    """``(d_sae,)`` phi, the correlation over pairs of firing in the image with firing in the text; NaN where a latent
    fires in one modality only, or in none or all.
    """
    image, text, n = evidence.lists("image"), evidence.lists("text"), evidence.n
    both = np.zeros(evidence.d_sae)
    for lo in range(0, evidence.d_sae, block):
        rows = slice(lo, min(lo + block, evidence.d_sae))
        a, b = (s.matrix(rows).astype(bool) for s in (image, text))
        both[rows] = np.asarray(a.multiply(b).sum(1)).ravel()
    a, b = (np.diff(np.asarray(s.start)).astype(float) for s in (image, text))
    spread = np.sqrt(a * (n - a) * b * (n - b))
    return np.where(spread > 0, (n * both - a * b) / np.where(spread > 0, spread, 1), np.nan)


def modality_index(evidence: Evidence) -> np.ndarray:
    """``(d_sae,)`` mean pooled value in images as a share of that in images and texts (arXiv 2504.11695); NaN for dead
    latents.
    """
    mean = {}
    for m in ("image", "text"):
        lists = evidence.lists(m)
        start, total = np.asarray(lists.start), np.zeros(evidence.d_sae)
        for lo in range(0, evidence.d_sae, 1024):
            hi = min(lo + 1024, evidence.d_sae)
            value = np.abs(np.asarray(lists.value[start[lo] : start[hi]], np.float64))
            total[lo:hi] = np.diff(np.concatenate([[0], np.cumsum(value)])[start[lo : hi + 1] - start[lo]])
        mean[m] = total
    whole = mean["image"] + mean["text"]
    return np.where(whole > 0, mean["image"] / np.where(whole > 0, whole, 1), np.nan)


def label_lift(
    lists: SparseRows, rows: slice, label: np.ndarray, labels: Sequence[str], k: int = 6
) -> Mapping[str, np.ndarray]:
    """The labels of the items on which latents fire, beside all items.

    Args:
        lists: Items on which latents fire.
        rows: Which latents.
        label: ``(n,)`` number of each item's label, -1 for none.
        labels: Their names.
        k: How many are listed, by the probability that chance gives so many (a G test's signed root).

    Returns:
        ``label``, ``count``: items with the label on which it fires; ``share`` of the latent's labelled items;
        ``lift``: that share over the label's share of all; all ``(latents, k)``, label -1 for none.
    """
    from scipy.sparse import csr_matrix

    known = np.flatnonzero(label >= 0)
    onehot = csr_matrix((np.ones(len(known), np.float32), (known, label[known])), shape=(len(label), len(labels)))
    base = np.asarray(onehot.sum(0)).ravel() / max(len(known), 1)
    count = (lists.matrix(rows).astype(bool).astype(np.float32) @ onehot).tocsr()
    fired = np.asarray(count.sum(1)).ravel()
    row = np.repeat(np.arange(count.shape[0]), np.diff(count.indptr))
    share = count.data / np.maximum(fired[row], 1)
    lift = share / np.maximum(base[count.indices], 1e-30)
    evidence = count.copy()
    evidence.data = np.where(lift > 1, count.data * np.log(np.maximum(lift, 1)), 0)
    best, _ = best_of_rows(evidence, k)
    at, has = np.maximum(best, 0), best >= 0
    found = np.asarray(count.toarray())[np.arange(len(best))[:, None], at] * has
    share = found / np.maximum(fired[:, None], 1)
    return {"label": best, "count": found, "share": share, "lift": share / np.maximum(base[at], 1e-30)}
