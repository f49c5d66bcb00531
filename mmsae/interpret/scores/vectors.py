"""Scores that embeddings give, without anybody to ask: by names (``clip_judge``, ``embedding``), and without them
(``example_embedding``, ``intruder``), which tell how good a latent is apart from how good its name is (arXiv
2507.08473).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mmsae.interpret.scores.clip_judge import similarities
from mmsae.interpret.scores.outcomes import Scores, accuracy_scores, auroc_scores
from mmsae.interpret.scores.subjects import Subjects

GATHERED = 2**25  # numbers at a time


def name_scores(s: Subjects, embeddings: np.ndarray, vectors: np.ndarray) -> Scores:
    """AUROC of the cosine of unseen items with the vector of the name ``(L, width)``."""
    on, off = (similarities(items, embeddings, vectors[:, None])[:, 0] for items in (s.positive, s.negative))
    return auroc_scores(s.latents, on, off)


def example_scores(s: Subjects, embeddings: np.ndarray) -> Scores:
    """AUROC of how much nearer an unseen item is to the seen positives than to the seen negatives, by mean cosine.

    The published score is the mean of that difference; its AUROC has a chance level.
    """
    middle = np.stack([mean_vectors(items, embeddings) for items in s.seen], 1)  # (L, 2, width)
    sides = [similarities(items, embeddings, middle) for items in (s.positive, s.negative)]
    on, off = (side[:, 0] - side[:, 1] for side in sides)
    return auroc_scores(s.latents, on, off)


def mean_vectors(items: np.ndarray, embeddings: np.ndarray) -> np.ndarray:
    """``(L, width)`` mean embedding of items ``(L, P)``, -1 for none; zeros for a row without any."""
    out = np.zeros((len(items), embeddings.shape[1]), np.float32)
    step = max(1, GATHERED // max(1, items.shape[1] * embeddings.shape[1]))
    for lo in range(0, len(items), step):
        rows = items[lo : lo + step]
        e = np.asarray(embeddings[rows.clip(0)], np.float32) * (rows >= 0)[..., None]
        out[lo : lo + step] = e.sum(1) / np.maximum((rows >= 0).sum(1), 1)[:, None]
    return out


def intruder_sets(
    positive: np.ndarray, negative: np.ndarray, size: int, trials: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Sets of items with one that does not belong.

    Each is ``size - 1`` positives that follow each other in strength, so that strength does not give the odd one away,
    and a negative, in random order. Draws depend on the seed and the row alone.

    Args:
        positive: ``(L, P)`` items, strongest first, -1 behind the last.
        negative: ``(L, N)``.
        size: Items of a set.
        trials: Sets of each latent.
        seed: Seed.

    Returns:
        ``(L, trials, size)`` items, -1 all over for latents with fewer positives than needed or no negative; and
        ``(L, trials)`` place of the odd one.
    """
    rng, n, k = np.random.default_rng(seed), len(positive), size - 1
    n_pos, n_neg = (positive >= 0).sum(1), (negative >= 0).sum(1)
    can = (n_pos >= k) & (n_neg > 0)
    start = (rng.random((n, trials)) * np.maximum(n_pos - k + 1, 1)[:, None]).astype(int)
    own = np.take_along_axis(positive[:, None], start[..., None] + np.arange(k), 2) if positive.shape[1] >= k else None
    if own is None:
        return np.full((n, trials, size), -1), np.zeros((n, trials), int)
    pick = (rng.random((n, trials)) * np.maximum(n_neg, 1)[:, None]).astype(int)
    odd = np.take_along_axis(negative, pick, 1)
    order = rng.random((n, trials, size)).argsort(2)
    sets = np.take_along_axis(np.concatenate([own, odd[..., None]], 2), order, 2)
    return np.where(can[:, None, None], sets, -1), (order == k).argmax(2)


def farthest(sets: np.ndarray, embeddings: np.ndarray) -> np.ndarray:
    """``(L, trials)`` place of the item of each set whose mean cosine with the others is least."""
    out = np.zeros(sets.shape[:2], int)
    step = max(1, GATHERED // max(1, sets[0].size * embeddings.shape[1])) if len(sets) else 1
    for lo in range(0, len(sets), step):
        e = np.asarray(embeddings[sets[lo : lo + step].clip(0)], np.float32)  # (l, trials, size, width)
        total = e.sum(2)
        out[lo : lo + step] = (np.einsum("ltsw,ltw->lts", e, total) - np.square(e).sum(3)).argmin(2)
    return out


def intruder_scores(
    s: Subjects, choose: Callable[[np.ndarray], np.ndarray], size: int = 5, trials: int = 20, seed: int = 0
) -> Scores:
    """Share of sets of unseen items in which the odd one is found; chance is ``1 / size``.

    ``choose`` maps sets ``(L, trials, size)`` to places, -1 where it abstains; those trials do not count.
    """
    sets, odd = intruder_sets(s.positive, s.negative, size, trials, seed)
    found = choose(sets)
    counted = (sets[..., 0] >= 0) & (found >= 0)
    return accuracy_scores(s.latents, ((found == odd) & counted).sum(1), counted.sum(1), 1 / size)
