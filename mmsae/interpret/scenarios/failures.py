"""Situations in which a model fails more often than elsewhere, found on one half of the items and judged on the other.

Slice discovery whose slices have names: the analogue of the critical scenarios of TRACE (arXiv 2502.02025;
reconstructed without a simulator, on the failures of any model).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from mmsae.interpret.scenarios.concepts import Concepts
from mmsae.interpret.scenarios.mining import (
    Conjunctions,
    adjusted,
    frequent,
    holding,
    least_items,
    over_represented,
)
from mmsae.interpret.scenarios.options import Mining
from mmsae.metrics.shares import benjamini_hochberg
from mmsae.metrics.statistics import wilson
from mmsae.types import InputError

CANDIDATES = 2000  # that are judged at most, the clearest first


class FailureSlice(NamedTuple):
    """A situation in which a model fails; all figures are of the half on which it was not found."""

    parts: tuple[int, ...]  #: Places of its concepts
    query: str  #: In the query language
    name: str  #: In names
    support: int  #: Items that it holds of
    failures: int  #: Failures among them
    rate: float  #: Share of failures
    low: float  #: Lower end of its 95 % interval (Wilson)
    high: float  #: Upper end
    lift: float  #: How many times as often as all items
    p: float  #: Fisher's exact test, one-sided
    q: float  #: The same, adjusted for all slices that were judged
    covers: float  #: Share of all failures that lie in it
    new: int  #: Failures in it that lie in no slice before it


def failure_slices(
    concepts: Concepts, failed: np.ndarray, test: np.ndarray, options: Mining = Mining()
) -> tuple[list[FailureSlice], dict[str, Any]]:
    """Slices by how clear they are, without near-duplicates.

    Conjunctions are mined on the items that are not ``test``; those with the asked lift whose p value holds up there
    are judged on the ``test`` items, on which they have to hold up again. Then slices are taken one by one, each time
    the clearest on what the ones before it leave; a slice that is clear only because it overlaps another is not taken.

    Args:
        concepts: The table.
        failed: ``(n,) bool`` whether the model fails; NaN or below 0: not known, and left out.
        test: ``(n,) bool`` the half that judges.
        options: Support, lift, FDR.

    Returns:
        The slices, and ``base`` (rate of failure), ``items`` and ``candidates`` of both halves.

    Raises:
        InputError: A half in which nothing, or everything, fails.
    """
    value = np.asarray(failed, float)
    known = ~np.isnan(value) & (value >= 0)
    halves = {}
    for name, half in (("train", known & ~test), ("test", known & test)):
        n, bad = int(half.sum()), int(value[half].sum())
        if not 0 < bad < n:
            raise InputError(f"the {name} half has {bad} failures in {n} items: there is nothing to compare")
        halves[name] = (half, n, bad)
    about: dict[str, Any] = {f"{k}_items": n for k, (_, n, _) in halves.items()}
    about |= {f"{k}_base": bad / n for k, (_, n, bad) in halves.items()}
    half, n, bad = halves["train"]
    own = concepts._replace(table=concepts.table.tocsr()[half].tocsc())
    found = frequent(own, least_items(options, n), options.order, value[half] > 0)
    log_p = over_represented(found.marked, found.support, np.full(len(found.support), bad), n)
    lift = found.marked / found.support / (bad / n)
    possible = sum(_choose(len(concepts.latents), k) for k in range(1, options.order + 1))
    clear = np.flatnonzero((lift >= options.lift) & (adjusted(np.exp(log_p), possible) <= options.fdr))
    clear = clear[np.argsort(log_p[clear], kind="stable")][:CANDIDATES]
    about |= {"mined": len(log_p), "candidates": len(clear)}
    half, n, bad = halves["test"]
    rest = concepts._replace(table=concepts.table.tocsr()[half].tocsc())
    slices = _judged(rest, found.take(clear), value[half] > 0, options)
    return slices, about


def _choose(n: int, k: int) -> int:
    from math import comb

    return comb(n, k)


def _judged(concepts: Concepts, found: Conjunctions, failed: np.ndarray, options: Mining) -> list[FailureSlice]:
    """Slices that hold up on other items, taken greedily."""
    if not len(found.support):
        return []
    inside = holding(concepts, found).astype(np.int32)
    n, bad = concepts.n, int(failed.sum())
    support, hits = np.asarray(inside.sum(0)).ravel(), np.asarray(failed.astype(np.int32) @ inside).ravel()
    log_p = over_represented(hits, support, np.full(len(hits), bad), n)
    q = benjamini_hochberg(np.exp(log_p))
    base = bad / n
    lift = hits / np.maximum(support, 1) / base
    sound = (q <= options.fdr) & (lift >= options.lift) & (support >= least_items(options, n))
    free, out = np.ones(n, bool), []
    left = np.flatnonzero(sound)
    while len(left) and len(out) < options.most:
        m = int(free.sum())
        fresh = free.astype(np.int32)
        size = np.asarray(fresh @ inside[:, left]).ravel()
        fails = np.asarray((fresh * failed) @ inside[:, left]).ravel()
        remaining = int(failed[free].sum())
        own = over_represented(fails, size, np.full(len(left), remaining), m)
        rate = fails / np.maximum(size, 1) / max(base, 1e-12)
        ok = (benjamini_hochberg(np.exp(own)) <= options.fdr) & (rate >= options.lift)
        if not ok.any():
            break
        best = int(np.flatnonzero(ok)[np.lexsort((support[left[ok]], own[ok]))[0]])
        k = left[best]
        parts = tuple(int(v) for v in found.parts[k] if v >= 0)
        low, high = wilson(int(hits[k]), int(support[k]))
        who = (parts, concepts.said(found.parts[k]), concepts.called(found.parts[k]), int(support[k]), int(hits[k]))
        figures = (hits[k] / support[k], low, high, lift[k], np.exp(log_p[k]), q[k], hits[k] / bad)
        out.append(FailureSlice(*who, *map(float, figures), int(fails[best])))
        free &= ~inside[:, [k]].toarray().ravel().astype(bool)
        left = np.delete(left, best)
    return out
