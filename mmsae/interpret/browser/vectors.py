"""Vectors of latents and of words, for the search by concept vectors in the page: ``like #12 - #40``, ``like dog``."""

from __future__ import annotations

from typing import Any

import numpy as np

from mmsae.interpret.browser.files import packed
from mmsae.interpret.browser.relations import unit_rows
from mmsae.interpret.evidence.folder import Evidence

WIDTH = 48  # coordinates that are kept
VOCABULARY, LEAST = 3000, 5  # words, and captions that each must be in


def latent_vectors(evidence: Evidence, atoms: np.ndarray | None, seed: int = 0) -> dict[str, Any] | None:
    """Vectors of all latents, and of words where embeddings of captions are kept.

    Where the evidence has embeddings, a latent is the mean embedding of the items on which it fires, weighted by its
    values, and a word that of the captions that have it, each modality about its own mean; the two are comparable where
    one host gave both. Without embeddings latents are their atoms.

    Returns:
        ``latents`` ``(d_sae, 48)`` and ``words``: ``text`` and ``vectors (w, 48)``, in whole numbers, unit rows times
        127; None where there is nothing to go by.
    """
    means = _centroids(evidence)
    vocabulary, words = _words(evidence) if means is not None else ([], None)
    vectors = atoms if means is None else means
    if vectors is None:
        return None
    joined = unit_rows(vectors if words is None else np.concatenate([vectors, words])).astype(np.float64)
    joined[~np.isfinite(joined)] = 0
    values, axes = np.linalg.eigh(joined.T @ joined)
    kept = unit_rows(joined @ axes[:, np.argsort(-values)[:WIDTH]])
    whole = np.rint(127 * kept)
    d_sae = evidence.d_sae
    return {
        "of": "atoms" if means is None else "items",
        "latents": packed(whole[:d_sae], "i1"),
        "words": {"text": vocabulary, "vectors": packed(whole[d_sae:], "i1")},
    }


def _centroids(evidence: Evidence) -> np.ndarray | None:
    """``(d_sae, width)`` mean centred embeddings of the items on which latents fire, or None."""
    out = None
    for m in evidence.modalities:
        embeddings = evidence.embeddings(m)
        if embeddings is None:
            continue
        centred = embeddings - embeddings.mean(0, dtype=np.float64).astype(np.float32)
        found = np.zeros((evidence.d_sae, embeddings.shape[1]), np.float32)
        for lo in range(0, evidence.d_sae, 1024):
            rows = slice(lo, min(lo + 1024, evidence.d_sae))
            found[rows] = unit_rows(abs(evidence.lists(m).matrix(rows)) @ centred)
        if out is None or out.shape[1] == found.shape[1]:
            out = found if out is None else out + found
    return out


def _words(evidence: Evidence) -> tuple[list[str], np.ndarray | None]:
    """Words of captions, and ``(w, width)`` mean centred embeddings of the captions that have them."""
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, CountVectorizer

    m = "text" if evidence.embeddings("text") is not None else "image"
    embeddings, captions = evidence.embeddings(m), evidence.items.caption
    if embeddings is None or not any(captions):
        return [], None
    counter = CountVectorizer(binary=True, token_pattern=r"(?u)\b\w[\w'-]+\b", max_features=VOCABULARY + 400)
    count = counter.fit_transform(captions)
    words, often = counter.get_feature_names_out(), np.asarray(count.sum(0)).ravel()
    kept = np.flatnonzero((often >= LEAST) & (often <= 0.5 * len(captions)) & ~np.isin(words, list(ENGLISH_STOP_WORDS)))
    kept = kept[np.argsort(-often[kept], kind="stable")[:VOCABULARY]]
    if not len(kept):
        return [], None
    centred = embeddings - embeddings.mean(0, dtype=np.float64).astype(np.float32)
    return words[kept].tolist(), unit_rows((count[:, kept].T @ centred) / often[kept, None])
