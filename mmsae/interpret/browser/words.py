"""Words of the captions on which latents are largest: what the search finds a latent by."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mmsae.interpret.browser.segments import best_of_rows

WORDS = 16  # of a latent


def caption_words(captions: Sequence[str], tops: Sequence[np.ndarray]) -> list[list[tuple[str, int]]]:
    """The words that stand out in the captions of each latent's top items, with the number of captions that have them.

    Args:
        captions: Of the m shown items; equal ones count once for a latent.
        tops: Per modality ``(d_sae, n)`` top items by their numbers, -1 for none.

    Returns:
        For each latent up to 16 words, by count times the logarithm of how much more frequent they are than in all
        shown captions; words like "the" are left out.
    """
    from scipy.sparse import csr_matrix
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, CountVectorizer

    top = np.concatenate(list(tops), 1)
    none: list[list[tuple[str, int]]] = [[] for _ in range(len(top))]
    counter = CountVectorizer(binary=True, token_pattern=r"(?u)\b\w[\w'-]*\b", max_features=50_000)
    try:
        count = counter.fit_transform(captions)
    except ValueError:  # no caption has a word
        return none
    words = counter.get_feature_names_out()
    common = np.isin(words, list(ENGLISH_STOP_WORDS))
    base = np.asarray(count.mean(0)).ravel()
    number = {c: i for i, c in enumerate(dict.fromkeys(captions))}
    distinct = np.array([number[c] for c in captions])
    first = np.unique(distinct, return_index=True)[1]
    latent = np.repeat(np.arange(len(top)), top.shape[1])
    keep = top.ravel() >= 0
    pair = np.unique(np.stack([latent[keep], distinct[top.ravel()[keep]]]), axis=1)
    member = csr_matrix((np.ones(pair.shape[1], np.float32), (pair[0], first[pair[1]])), (len(top), len(captions)))
    out = none
    for lo in range(0, len(top), 4096):
        found = (member[lo : lo + 4096] @ count.astype(np.float32)).tocsr()
        size = np.maximum(np.asarray(member[lo : lo + 4096].sum(1)).ravel(), 1)
        row = np.repeat(np.arange(found.shape[0]), np.diff(found.indptr))
        score = found.copy()
        lift = found.data / size[row] / base[found.indices]
        score.data = ~common[found.indices] * found.data * np.log(np.maximum(lift, 1))
        best, _ = best_of_rows(score, WORDS)
        counts = np.asarray(found[np.arange(found.shape[0])[:, None], np.maximum(best, 0)].todense())
        for i in range(len(best)):
            out[lo + i] = [(str(words[w]), int(c)) for w, c in zip(best[i], counts[i], strict=True) if w >= 0]
    return out
