"""Names by soft-WPMI (method ``wpmi``), after CLIP-Dissect (T. Oikarinen and T.-W. Weng, arXiv 2204.10965).

``P[n, v] = softmax_v(a cos(e_n, t_v))``; over the K strongest items of a latent, with membership probabilities ``p_r``
that fall linearly from .998 to .97 by rank, ``L[i, v] = sum_r log(1 + p_r (P[n_r, v] - 1) + 1e-7)``; the score is
``L[i, v] - lam (logsumexp_i L[:, v] - log F)``, whose second part says how likely a word is for any latent.

The published code pads the strongest items of rare latents with silent ones. Here only items on which a latent fires
count, and the sum of fewer than K is scaled up to K, so that latents stay comparable; with K of them it is the
published number. The F latents of the second part are those that fire, always the same set.
"""

from __future__ import annotations

import numpy as np
import torch

from mmsae.interpret.evidence.folder import SparseRows
from mmsae.interpret.names.phrases import PhraseScores

ENTRIES = 4_000_000  # codes at a time
GATHERED = 2**26  # probabilities at a time


def strongest(lists: SparseRows, keep: np.ndarray, most: int) -> np.ndarray:
    """``(d_sae, most) int64`` the kept items on which each latent is largest in absolute value, best first; -1 for
    none.

    ``keep (n,)`` says which items count; equal values go by the item.
    """
    n_latents, start = lists.n, np.asarray(lists.start)
    out, lo = np.full((n_latents, most), -1), 0
    while lo < n_latents:
        hi = max(lo + 1, int(np.searchsorted(start, start[lo] + ENTRIES, "right")) - 1)
        at = slice(int(start[lo]), int(start[hi]))
        item, value = np.asarray(lists.index[at]), np.abs(lists.value[at])
        latent = np.repeat(np.arange(lo, hi), np.diff(start[lo : hi + 1]))
        on = keep[item] & (value > 0)
        item, value, latent = item[on], value[on], latent[on]
        order = np.lexsort((item, -value, latent))
        item, latent = item[order], latent[order]
        rank = np.arange(len(latent)) - np.searchsorted(latent, latent)
        first = rank < most
        out[latent[first], rank[first]] = item[first]
        lo = hi
    return out


def log_likelihood(
    top: np.ndarray,
    embeddings: np.ndarray,
    vectors: np.ndarray,
    a: float = 10.0,
    p: tuple[float, float] = (0.998, 0.97),
) -> np.ndarray:
    """``(L, V) float32`` of the strongest items ``top (L, K)`` of latents, -1 for none.

    Args:
        top: Places in ``embeddings``.
        embeddings: ``(n, width)`` unit embeddings of items.
        vectors: ``(V, width)`` unit vectors of phrases.
        a: Factor of the cosines.
        p: Membership probability of the first item, and what it would be of item K + 1.
    """
    k, words = top.shape[1], torch.from_numpy(vectors.astype(np.float32))
    member = torch.from_numpy(p[0] - np.arange(k) / k * (p[0] - p[1])).float()
    out, step = np.empty((len(top), len(words)), np.float32), max(1, GATHERED // (k * len(words)))
    for lo in range(0, len(top), step):
        used, at = np.unique(top[lo : lo + step].clip(0), return_inverse=True)
        cosine = torch.from_numpy(np.asarray(embeddings[used], np.float32)) @ words.T
        chance, at = torch.softmax(a * cosine, 1), torch.from_numpy(at.reshape(-1, k))
        on, total = torch.from_numpy(top[lo : lo + step] >= 0), torch.zeros(len(at), len(words))
        for r in range(k):  # K passes over (latents, phrases) instead of one array K times as large
            total += torch.log(1 + member[r] * (chance[at[:, r]] - 1) + 1e-7) * on[:, r, None]
        out[lo : lo + step] = total * (k / on.sum(1).clamp(min=1))[:, None]
    return out


def wpmi_scores(
    top: np.ndarray,
    latents: np.ndarray,
    phrases: list[str],
    embeddings: np.ndarray,
    vectors: np.ndarray,
    lam: float = 1.0,
) -> PhraseScores:
    """Soft-WPMI of phrases for latents that fire; ``top (d_sae, K)`` are their strongest items."""
    rows = top[latents]
    likely = PhraseScores(latents, phrases, lambda lo, hi: log_likelihood(rows[lo:hi], embeddings, vectors)).kept()
    peak = total = None
    for lo, hi in likely.blocks(2**22):
        part = likely.block(lo, hi).astype(np.float64)
        top_ = part.max(0) if peak is None else np.maximum(peak, part.max(0))
        total = np.exp(part - top_).sum(0) + (0 if total is None else total * np.exp(peak - top_))
        peak = top_
    prior = 0.0 if peak is None else (peak + np.log(total) - np.log(len(latents))).astype(np.float32)
    return likely._replace(block=lambda lo, hi: likely.block(lo, hi) - lam * prior)
