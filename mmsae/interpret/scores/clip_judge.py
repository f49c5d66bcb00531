"""The judge that needs nobody to ask: does a name's text vector tell items on which a latent fires from others?

AUROC of the cosine between the embedding of an item (an image, or a text) and the mean vector of the name over prompt
templates. Use another encoder than the one that is explained, or the name is judged by what it was made of.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mmsae.interpret.scores.outcomes import auroc_rows

GATHERED = 2**25  # numbers at a time


def similarities(items: np.ndarray, embeddings: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """``(L, m, P) float32`` cosines of items ``(L, P)``, -1 for none (NaN), with m vectors ``(L, m, width)`` of each
    row.
    """
    out = np.full((len(items), vectors.shape[1], items.shape[1]), np.nan, np.float32)
    step = max(1, GATHERED // max(1, items.shape[1] * embeddings.shape[1]))
    for lo in range(0, len(items), step):
        rows, at = items[lo : lo + step], slice(lo, lo + step)
        e = np.asarray(embeddings[rows.clip(0)], np.float32)
        out[at] = np.where(rows[:, None] >= 0, np.einsum("lpw,lmw->lmp", e, vectors[at].astype(np.float32)), np.nan)
    return out


def judge_by_vectors(
    positive: np.ndarray, negative: np.ndarray, embeddings: np.ndarray, vectors: np.ndarray,
    weight: np.ndarray | None = None,
) -> np.ndarray:  # fmt: skip
    """``(L, m)`` AUROC of m names ``(L, m, width)`` of every latent, on its items ``(L, P)`` and ``(L, N)``.

    ``weight (L, P)``: how much a positive counts, 1 without.
    """
    on, off = (similarities(items, embeddings, vectors) for items in (positive, negative))
    each = None if weight is None else np.repeat(weight, vectors.shape[1], 0)
    flat = auroc_rows(on.reshape(-1, on.shape[2]), off.reshape(-1, off.shape[2]), each)
    return flat.reshape(vectors.shape[:2])


def judge_by_words(
    positive: np.ndarray, negative: np.ndarray, captions: Sequence[str], phrases: Sequence[Sequence[str | None]],
    weight: np.ndarray | None = None,
) -> np.ndarray:  # fmt: skip
    """``(L, m)`` AUROC of "the caption has the phrase" for m phrases of every latent, None for none (NaN).

    Items without a caption are left out; a phrase is there where its words stand in a row. ``weight (L, P)``: how much
    a positive counts, 1 without.
    """
    from mmsae.metrics.concepts.ngrams import WORD

    used = np.unique(np.concatenate([positive.ravel(), negative.ravel()]))
    said = {int(i): f" {' '.join(WORD.findall(captions[i].lower()))} " for i in used.tolist() if i >= 0}
    most = max((len(p) for p in phrases), default=0)
    out = np.full((len(phrases), most), np.nan)
    has = np.zeros(len(captions) + 1, bool)  # the last is for -1
    has[[i for i, text in said.items() if text.strip()]] = True
    there = [has[items] for items in (positive, negative)]
    for row, own in enumerate(phrases):
        for column, phrase in enumerate(own):
            if phrase is not None:
                words = f" {' '.join(WORD.findall(phrase.lower()))} "
                on, off = ([words in said[i] for i in items[row, k].tolist()]
                           for items, k in ((positive, there[0][row]), (negative, there[1][row])))  # fmt: skip
                counts = None if weight is None else weight[row, there[0][row]]
                if on and off and (counts is None or counts.any()):
                    out[row, column] = 0.5 + (np.average(on, weights=counts) - np.mean(off)) / 2
    return out
