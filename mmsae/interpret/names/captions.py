"""Names by captions (method ``captions``): the phrases that captions of a latent's items have and others do not.

No model is needed. Items on which a latent fires count by their share of its largest value; they are compared with the
items on which it is silent (:func:`mmsae.metrics.concepts.ngrams.log_odds`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mmsae.interpret.evidence.folder import SparseRows
from mmsae.interpret.names.phrases import PhraseScores
from mmsae.metrics.concepts.ngrams import log_odds, phrases_of

CAPTIONS = 200_000  # that phrases are counted in
RARE, COMMON = 5, 0.5  # captions that a phrase needs, and the share of them above which it says nothing


def count_phrases(captions: Sequence[str], longest: int = 3, rare: int = RARE):
    """``(phrases, scipy.sparse.csr_matrix (n, V))``: which captions have which phrase, of those that are neither in
    fewer than ``rare`` captions nor in more than half of them.
    """
    from sklearn.feature_extraction.text import CountVectorizer

    def distinct(text: str) -> list[str]:
        return list(dict.fromkeys(phrases_of(text, longest)))

    counter = CountVectorizer(analyzer=distinct, binary=True, dtype=np.float32)
    try:
        counts = counter.fit_transform(captions)
    except ValueError:  # no caption has a word
        from scipy.sparse import csr_matrix

        return [], csr_matrix((len(captions), 0), dtype=np.float32)
    often = np.asarray(counts.sum(0)).ravel()
    keep = np.flatnonzero((often >= min(rare, max(1, len(captions) // 10))) & (often <= COMMON * len(captions)))
    phrases = counter.get_feature_names_out()[keep]
    return phrases.tolist(), counts[:, keep].tocsr()


def caption_scores(
    codes: SparseRows, latents: np.ndarray, captions: Sequence[str], keep: np.ndarray, longest: int = 3, seed: int = 0
) -> PhraseScores:
    """z-scores of the log-odds of phrases.

    Args:
        codes: ``(n, d_sae)`` pooled codes.
        latents: Which latents.
        captions: The n captions; items without one are left out.
        keep: ``(n,)`` bool, the items to use.
        longest: Words of a phrase, at most.
        seed: Which captions are counted where there are more than 200,000.
    """
    rows = np.flatnonzero(keep & np.array([bool(c) for c in captions], bool))
    if len(rows) > CAPTIONS:
        rows = np.sort(np.random.default_rng(seed).permutation(rows)[:CAPTIONS])
    phrases, has = count_phrases([captions[i] for i in rows.tolist()], longest)
    z = abs(codes.matrix(rows)).tocsc()[:, latents].T.tocsr().astype(np.float32)  # (L, rows)
    fires = (z != 0).astype(np.float32)
    top = np.maximum(z.max(1).toarray().ravel(), 1e-30) if len(rows) else np.ones(len(latents))
    often = np.asarray(has.sum(0)).ravel().astype(np.float64)
    share = often / max(len(rows), 1)

    def block(lo: int, hi: int) -> np.ndarray:
        weight = z[lo:hi].multiply(1 / top[lo:hi, None]).tocsr()
        silent = often - (fires[lo:hi] @ has).toarray()
        n = np.asarray(weight.sum(1)).ravel()
        rest = len(rows) - np.diff(fires.indptr[lo : hi + 1])
        return log_odds((weight @ has).toarray(), n, silent, rest, share).astype(np.float32)

    return PhraseScores(latents, phrases, block)
