"""Names by the mean item (method ``centroid``): the phrase nearest to the activation-weighted mean embedding.

``c_i = sum_n v[n, i] e_n / sum_n v[n, i]`` with centred embeddings ``e_n`` of items by an encoder that need not be the
SAE's host; it works at any site. One sparse product, streamed over items.

The score is ``<c_i, t_v>``, not the cosine: of one latent it ranks phrases alike, and says by how much the items on
which a latent fires are more like the phrase than all items are. Divided by its length, the mean of a latent that fires
whatever is shown, which is nearly 0, would be as near to some phrase as any other, and its scores would drown those of
the others in the z-score over latents.
"""

from __future__ import annotations

import numpy as np

from mmsae.interpret.evidence.folder import SparseRows
from mmsae.interpret.names.phrases import PhraseScores

ROWS = 65_536  # items at a time


def unit(x: np.ndarray) -> np.ndarray:
    """Rows of length 1; zero rows stay zero."""
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def centred(vectors: np.ndarray) -> np.ndarray:
    """Unit rows about their mean; a single row has nothing to be told from and stays as it is."""
    return unit(vectors - vectors.mean(0)) if len(vectors) > 1 else unit(vectors)


def mean_of(embeddings: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """``(width,) float64`` mean of the rows that ``keep (n,)`` says, read block by block; zeros of none."""
    total, n = np.zeros(embeddings.shape[1]), int(keep.sum())
    for lo in range(0, len(embeddings), ROWS):
        total += embeddings[lo : lo + ROWS][keep[lo : lo + ROWS]].sum(0, dtype=np.float64)
    return total / max(n, 1)


def centroids(codes: SparseRows, embeddings: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """``(d_sae, width) float64`` weighted mean of centred embeddings of the items on which each latent fires.

    Weights are absolute values, as those by which evidence is ranked; latents that never fire have zeros.

    Args:
        codes: ``(n, d_sae)`` pooled codes.
        embeddings: ``(n, width)``.
        keep: ``(n,)`` bool, the items to use.
    """
    total, weight = np.zeros((codes.width, embeddings.shape[1])), np.zeros(codes.width)
    middle, count = np.zeros(embeddings.shape[1]), int(keep.sum())
    for lo in range(0, codes.n, ROWS):
        rows = np.flatnonzero(keep[lo : lo + ROWS]) + lo
        z, e = abs(codes.matrix(rows)).astype(np.float64), embeddings[rows].astype(np.float64)
        total += z.T @ e
        weight += np.asarray(z.sum(0)).ravel()
        middle += e.sum(0)
    mean = total / np.maximum(weight, 1e-300)[:, None]
    return np.where(weight[:, None] > 0, mean - middle / max(count, 1), 0)


def centroid_scores(means: np.ndarray, latents: np.ndarray, phrases: list[str], vectors: np.ndarray) -> PhraseScores:
    """Products of :func:`centroids` with the centred unit vectors ``(V, width)`` of phrases."""
    rows, words = means[latents].astype(np.float32), centred(vectors).astype(np.float32)
    return PhraseScores(latents, phrases, lambda lo, hi: rows[lo:hi] @ words.T)
