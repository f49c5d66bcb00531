"""What a query finds in a corpus: items by match, and how rare, surprising and critical the situation is."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mmsae.interpret.scenarios.mining import log_share, rarity
from mmsae.metrics.concepts.query import AreaMeasures, LatentLists, Query, evaluate, parse
from mmsae.metrics.statistics import wilson


class QueryFound(NamedTuple):
    """One query over a corpus."""

    query: str  #: Its text
    items: (
        np.ndarray
    )  #: ``(m,) int64`` the best items, best first, those that it holds of before others; all score above 0
    match: np.ndarray  #: ``(m,) float32`` their scores
    support: int  #: Items that it holds of
    rarity: float  #: ``-log P`` of that, smoothed
    #: Logarithm of how many times as often it holds as its parts explain, if they were independent; None where it is
    #: no conjunction
    surprise: float | None
    failures: dict[str, float] | None  #: Rate, interval and lift of a model's failures, where they are known
    #: Of each concept that the query denies: the share of items whose caption tells it and on which it is silent
    misses: dict[str, float]


def run_query(
    text: str | Query, codes: Mapping[str, LatentLists], *, names: Mapping[int, str] | None = None,
    areas: AreaMeasures | None = None, captions: Sequence[str] = (), failed: np.ndarray | None = None, most: int = 50,
) -> QueryFound:  # fmt: skip
    """Score all items by a query.

    Args:
        text: The query.
        codes: ``{modality: lists}`` of the items.
        names: Names of latents.
        areas: For ``count``, ``left_of`` and ``overlap``.
        captions: Of the items, for the miss rates of denied concepts.
        failed: ``(n,)`` 1 where a model fails, 0 where not, NaN where that is not known.
        most: Items that are listed.
    """
    query = (parse(text) if isinstance(text, str) else text).bind(names or {})
    given = {"names": names, "areas": areas}
    score, holds = evaluate(query, codes, **given), evaluate(query, codes, **given, holds=True)
    n, support = len(score), int(holds.sum())
    # what it holds of comes first: 1 - x of a denied concept is above 0 where the concept fires weakly
    order = np.lexsort((-score, ~holds))[:most]
    order = order[score[order] > 0]
    surprise = None
    if query.op == "&":
        parts = [int(evaluate(p, codes, **given, holds=True).sum()) for p in query.parts]
        surprise = float(log_share(support, n) - log_share(np.array(parts), n).sum())
    found = _failures(holds, failed) if failed is not None else None
    missed = _misses(query, codes, names or {}, captions)
    return QueryFound(str(text), order, score[order], support, float(rarity(support, n)), surprise, found, missed)


def _failures(holds: np.ndarray, failed: np.ndarray) -> dict[str, float]:
    value = np.asarray(failed, float)
    known = ~np.isnan(value) & (value >= 0)
    n, hits, base = int((holds & known).sum()), int((value[holds & known] > 0).sum()), (value[known] > 0).mean()
    low, high = wilson(hits, n)
    rate = hits / n if n else float("nan")
    return {"items": n, "rate": rate, "low": low, "high": high, "lift": rate / base if base else float("nan")}


def _denied(query: Query, inverse: bool = False) -> set[int]:
    if query.op == "latent":
        return {query.latent} if inverse else set()
    return set().union(*(_denied(p, inverse ^ (query.op == "~")) for p in query.parts), set())


def _misses(
    query: Query, codes: Mapping[str, LatentLists], names: Mapping[int, str], captions: Sequence[str]
) -> dict[str, float]:  # fmt: skip
    """How often denied concepts are silent although captions tell them: silence is no proof of absence."""
    image = codes.get("image")
    out: dict[str, float] = {}
    if image is None or not any(captions):
        return out
    for j in sorted(_denied(query)):
        if not (name := names.get(j)):
            continue
        word = re.compile(rf"\b{re.escape(name)}\b", re.I)
        told = np.fromiter((word.search(c) is not None for c in captions), bool, len(captions))
        fires = np.zeros(len(captions), bool)
        items, values = image.row(j)
        fires[items[values != 0]] = True
        if told.any():
            out[name] = float((told & ~fires).sum() / told.sum())
    return out


def about_query(found: QueryFound, uids: Sequence[str]) -> dict[str, Any]:
    """Plain values of what a query found."""
    said = found._asdict()
    said["items"] = [uids[i] for i in found.items]
    said["match"] = [round(float(v), 6) for v in found.match]
    return said
