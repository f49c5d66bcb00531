"""Scores of many phrases for many latents, computed block by block, and the best phrases of each latent.

Some phrases score high for every latent ("photo"), so ranks are corrected for such hubs: by cross-domain similarity
local scaling (CSLS; A. Conneau et al., arXiv 1710.04087), and every choice carries its z-score among the scores that
the same phrase has for all latents: about their median, in units of 1.4826 times the median absolute deviation. Of a
normal distribution that is the plain z-score; but where one latent in ten has the same meaning, as "large" may have in
a small SAE, the plain one cannot reach 3 for any of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np

Hubs = Literal["csls", "z", "none"]
NEAREST = 10  # scores that CSLS takes the mean of
MEMORY = 2**26  # scores in a block, or kept
SAMPLE = 4096  # latents, evenly spaced, of which medians are taken where there are more


class PhraseScores(NamedTuple):
    """A method's scores of V phrases for L latents."""

    latents: np.ndarray  #: ``(L,)`` which latents; those that never fire are left out
    phrases: Sequence[str]  #: The V phrases
    block: Callable[[int, int], np.ndarray]  #: ``(lo, hi) -> (hi - lo, V) float32`` scores, the larger the better

    def blocks(self, memory: int | None = None) -> list[tuple[int, int]]:
        """Rows to take at a time, of so many scores (default :data:`MEMORY`)."""
        step = max(1, (MEMORY if memory is None else memory) // max(1, len(self.phrases)))
        return [(lo, min(lo + step, len(self.latents))) for lo in range(0, len(self.latents), step)]

    def kept(self) -> PhraseScores:
        """The same, computed once where it fits in memory."""
        if len(self.latents) * len(self.phrases) > MEMORY:
            return self
        whole = [self.block(lo, hi) for lo, hi in self.blocks(MEMORY // 8)]
        table = np.concatenate(whole) if whole else np.zeros((0, len(self.phrases)), np.float32)
        return self._replace(block=lambda lo, hi: table[lo:hi])


class BestPhrases(NamedTuple):
    """The m best phrases of L latents, best first; m is smaller where there are fewer phrases."""

    latents: np.ndarray  #: ``(L,)``
    phrase: np.ndarray  #: ``(L, m)`` places in the list of phrases
    score: np.ndarray  #: ``(L, m)`` the method's score
    margin: np.ndarray  #: ``(L, m)`` how far the rank's score is above the next one's; NaN for the last phrase of all
    z: np.ndarray  #: ``(L, m)`` deviations above the median of the phrase's scores over latents; NaN where they are 0


class _PhraseStats(NamedTuple):
    middle: np.ndarray  # (V,) median over latents
    spread: np.ndarray  # 1.4826 median absolute deviation; NaN where it is 0
    near: np.ndarray  # (V,) mean of the largest NEAREST


def _largest(x: np.ndarray, k: int, axis: int) -> np.ndarray:
    k = min(k, x.shape[axis])
    return np.take(np.partition(x, x.shape[axis] - k, axis), range(x.shape[axis] - k, x.shape[axis]), axis)


def _stats(table: PhraseScores) -> _PhraseStats:
    near, some, every = np.zeros((0, len(table.phrases)), np.float32), [], -(-len(table.latents) // SAMPLE)
    for lo, hi in table.blocks():
        s = table.block(lo, hi)
        near = _largest(np.concatenate([near, s]), NEAREST, 0)
        some.append(s[-lo % every :: every].copy())
    sample = np.concatenate(some)
    middle = np.median(sample, 0)
    sample -= middle
    spread = 1.4826 * np.median(np.abs(sample, out=sample), 0)
    return _PhraseStats(middle, np.where(spread > 1e-6 * np.abs(middle), spread, np.nan), near.mean(0))


def csls(scores: np.ndarray, near: np.ndarray) -> np.ndarray:
    """``(L, V)`` CSLS: ``2 s[i, v] - r[i] - r[v]``, of scores ``(L, V)``; ``near (V,)`` is r[v], the mean of the
    largest scores of a phrase over all latents, and r[i] that of a latent over phrases.
    """
    return 2 * scores - _largest(scores, NEAREST, 1).mean(1, keepdims=True) - near


def best_phrases(table: PhraseScores, most: int = 3, hubs: Hubs = "csls") -> BestPhrases:
    """The ``most`` best phrases of every latent.

    Args:
        table: Scores.
        most: How many phrases.
        hubs: What ranks phrases: ``csls``, ``z`` (the score among those of the same phrase), or the score (``none``).
    """
    n, m = len(table.latents), min(most, len(table.phrases))
    if not n or not m:
        empty = np.zeros((n, m))
        return BestPhrases(table.latents, empty.astype(int), empty, empty, empty)
    table = table.kept()
    stats, parts = _stats(table), []
    for lo, hi in table.blocks():
        s = table.block(lo, hi)
        with np.errstate(invalid="ignore", divide="ignore"):
            z = (s - stats.middle) / stats.spread
        rank = csls(s, stats.near) / 2 if hubs == "csls" else np.nan_to_num(z) if hubs == "z" else s
        parts.append(_top(s, rank, z, m))
    return BestPhrases(table.latents, *(np.concatenate(p) for p in zip(*parts, strict=True)))


def _top(s: np.ndarray, rank: np.ndarray, z: np.ndarray, m: int) -> tuple[np.ndarray, ...]:
    count = min(m + 1, s.shape[1])
    at = np.argpartition(-rank, count - 1, 1)[:, :count]
    at = np.take_along_axis(at, np.lexsort((at, -np.take_along_axis(rank, at, 1))), 1)  # ties by the phrase's place
    r = np.take_along_axis(rank, at, 1)
    r = np.concatenate([r, np.full((len(r), m + 1 - count), np.nan)], 1)
    at = at[:, :m]
    return at, np.take_along_axis(s, at, 1), r[:, :m] - r[:, 1 : m + 1], np.take_along_axis(z, at, 1)
