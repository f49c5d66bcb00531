"""Comparing shares and counts of binary events, many at a time: differences with intervals and p values, the false
discovery rate, and how far two events go together.

Everything takes and gives arrays, one entry a latent (or a pair of latents), and no loop is over entries.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mmsae.metrics.statistics import wilson_ends
from mmsae.types import InputError

Z95 = 1.959964
LEAST_EXPECTED = 5  # Cochran's rule: below it the normal approximation of a table is not to be trusted
CELLS = 4_000_000  # terms of exact tables in memory at a time


class ShareDifference(NamedTuple):
    """What two corpora differ in, ``(d,)`` each; a - b changes its sign, and nothing else, when they change places."""

    a: np.ndarray  #: Shares in the first
    b: np.ndarray  #: Shares in the second
    difference: np.ndarray  #: a - b
    low: np.ndarray  #: Lower end of its 95 % interval
    high: np.ndarray  #: Upper end
    relative: np.ndarray  #: The difference as a share of the larger of the two, in [-1, 1]; 0 where both are 0
    z: np.ndarray  #: Standardised difference (two-proportion z, or McNemar's)
    p: np.ndarray  #: Two-sided p value
    exact: np.ndarray  #: ``bool`` whether p is exact (Fisher's, or binomial) rather than that of z


def benjamini_hochberg(p: np.ndarray) -> np.ndarray:
    """``(d,)`` adjusted p values (Benjamini and Hochberg, JRSS B 1995): calling those up to .05 differences, 5 % of the
    calls are expected to be wrong. NaN stays NaN and is no test.
    """
    p = np.asarray(p, float)
    out = np.full(p.shape, np.nan)
    tested = np.flatnonzero(~np.isnan(p))
    order = tested[np.argsort(-p[tested], kind="stable")]
    rank = np.arange(len(order), 0, -1)
    out[order] = np.minimum.accumulate(np.minimum(p[order] * len(order) / rank, 1)) if len(order) else []
    return out


def two_proportions(hits_a: np.ndarray, n_a: int, hits_b: np.ndarray, n_b: int) -> ShareDifference:
    """Shares of two independent sets of items.

    z is that of the pooled variance, p is Fisher's exact one where an expected count is below 5 and that of z
    elsewhere; the interval is Newcombe's hybrid of Wilson's scores (Statistics in Medicine 17, 1998, method 10).

    Args:
        hits_a: ``(d,)`` items of the first set in which each event happened.
        n_a: Items of the first set.
        hits_b: ``(d,)`` of the second.
        n_b: Items of the second set.

    Raises:
        InputError: An empty set.
    """
    if not n_a or not n_b:
        raise InputError(f"shares are compared between {n_a} items and {n_b}: both sides need some")
    x, y = np.asarray(hits_a, float), np.asarray(hits_b, float)
    a, b, pooled = x / n_a, y / n_b, (x + y) / (n_a + n_b)
    spread = np.sqrt(pooled * (1 - pooled) * (1 / n_a + 1 / n_b))
    z = np.divide(a - b, spread, out=np.zeros_like(a), where=spread > 0)
    exact = np.minimum(pooled, 1 - pooled) * min(n_a, n_b) < LEAST_EXPECTED
    p = two_sided(z)
    p[exact] = fisher_exact(x[exact], n_a, y[exact], n_b)
    (low_a, high_a), (low_b, high_b) = wilson_ends(x, n_a), wilson_ends(y, n_b)
    low = a - b - np.sqrt((a - low_a) ** 2 + (high_b - b) ** 2)
    high = a - b + np.sqrt((high_a - a) ** 2 + (b - low_b) ** 2)
    return ShareDifference(a, b, a - b, low, high, _relative(a, b), z, p, exact)


def paired_proportions(only_a: np.ndarray, only_b: np.ndarray, both: np.ndarray, n: int) -> ShareDifference:
    """Shares of one set of items seen twice: the same images under two models, the pictures and their captions.

    p is McNemar's (Psychometrika 12, 1947) in its exact binomial form, z = (only_a - only_b) / sqrt(only_a + only_b);
    the interval is Wald's with half a count added to every cell (Agresti and Min, Statistics in Medicine 24, 2005).

    Args:
        only_a: ``(d,)`` items in which each event happened the first time and not the second.
        only_b: ``(d,)`` the second time and not the first.
        both: ``(d,)`` both times.
        n: Items.
    """
    if not n:
        raise InputError("paired shares are of 0 items: the two sides have none in common")
    x, y, common = (np.asarray(v, float) for v in (only_a, only_b, both))
    a, b, odd = (x + common) / n, (y + common) / n, x + y
    z = np.divide(x - y, np.sqrt(odd), out=np.zeros_like(x), where=odd > 0)
    m, u, v = n + 2, x + 0.5, y + 0.5
    middle, half = (u - v) / m, Z95 * np.sqrt((u + v) / m - ((u - v) / m) ** 2) / np.sqrt(m)
    low, high = np.minimum(middle - half, a - b), np.maximum(middle + half, a - b)
    return ShareDifference(a, b, a - b, low, high, _relative(a, b), z, mcnemar(x, y), np.ones(len(x), bool))


def _relative(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    most = np.maximum(a, b)
    return np.divide(a - b, most, out=np.zeros_like(a), where=most > 0)


def two_sided(z: np.ndarray) -> np.ndarray:
    """Two-sided p values of standard normal deviates."""
    from scipy.special import ndtr

    return 2 * ndtr(-np.abs(z))


def mcnemar(only_a: np.ndarray, only_b: np.ndarray) -> np.ndarray:
    """``(d,)`` exact two-sided p values that items changed as often one way as the other; 1 where none changed."""
    from scipy.stats import binom

    x, y = np.asarray(only_a), np.asarray(only_b)
    return np.minimum(2 * binom.cdf(np.minimum(x, y), x + y, 0.5), 1)


def fisher_exact(hits_a: np.ndarray, n_a: int, hits_b: np.ndarray, n_b: int) -> np.ndarray:
    """``(d,)`` two-sided p values of Fisher's exact test: all tables with these margins that are no more likely.

    Equal tables are computed once; the arguments are those of :func:`two_proportions`.
    """
    from scipy.special import gammaln

    tables, where = np.unique(np.stack([np.asarray(hits_a), np.asarray(hits_b)], 1), axis=0, return_inverse=True)
    x, k = tables[:, 0].astype(int), tables.sum(1).astype(int)
    lowest, highest = np.maximum(0, k - n_b), np.minimum(k, n_a)
    out = np.ones(len(x))

    def log_ways(n: int, i: np.ndarray) -> np.ndarray:
        return gammaln(n + 1) - gammaln(i + 1) - gammaln(n - i + 1)

    widest = int((highest - lowest).max(initial=0)) + 1
    for at in np.array_split(np.arange(len(x)), -(-len(x) * widest // CELLS) or 1):
        i = lowest[at, None] + np.arange(widest)
        inside = i <= highest[at, None]
        i = np.where(inside, i, lowest[at, None])
        total = k[at, None]
        log_p = log_ways(n_a, i) + log_ways(n_b, total - i) - log_ways(n_a + n_b, total)
        own = np.take_along_axis(log_p, (x - lowest)[at, None], 1)
        out[at] = np.where(inside & (log_p <= own + 1e-7), np.exp(log_p), 0).sum(1)
    return np.minimum(out, 1)[where.ravel()]


def npmi(both: np.ndarray, x: np.ndarray, y: np.ndarray, n: int) -> np.ndarray:
    """Normalised pointwise mutual information of pairs of events (Bouma, GSCL 2009), in [-1, 1].

    1 where they always come together, 0 where they are independent, -1 where they never meet (not 0, as tables that are
    filled by counting alone say).

    Args:
        both: Items in which both happened.
        x: Items in which the first happened, of the same shape.
        y: Items in which the second happened.
        n: All items.
    """
    both, x, y = (np.asarray(v, float) for v in (both, x, y))
    with np.errstate(divide="ignore", invalid="ignore"):
        value = np.log(both * n / (x * y)) / -np.log(both / n)
    value = np.where(both == n, 1.0, value)
    return np.where(both == 0, -1.0, value)
