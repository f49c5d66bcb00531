"""Items by the properties that they have and have not, from concepts and from the embeddings of a host.

A query over concepts scores items (:mod:`mmsae.metrics.concepts.query`) in two ways: by minima and maxima of
percentiles alone, by which an item with little of what is excluded may come before one with none of it; and those items
first of which the query holds. Beside them stand three dense ways that get the same words: the query as one phrase, the
sum of its phrases' cosines with minus for what is excluded, and the same minima and maxima over percentiles of cosines.
And both together: the items of which the query holds first, and in either part those with the largest dense sum first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mmsae.metrics.concepts.query import LatentLists, Query, evaluate, on_grid
from mmsae.metrics.precision_recall import RankingQuality, draws_interval, ranking_draws, ranking_quality
from mmsae.types import InputError

if TYPE_CHECKING:
    from mmsae.interpret.areas.relations import CorpusAreas

CONCEPTS, HELD, BOTH = "concepts", "concepts, held first", "held first, then dense sum"
SOME = 8  # values that a sentence names
DENSE = ("dense phrase", "dense sum", "dense logic")


class Retrieved(NamedTuple):
    """What was found for one query."""

    query: str  #: As it was asked
    scores: dict[str, np.ndarray]  #: ``{way: (n,)}``: by concepts, and the dense ways where there are embeddings
    holds: int  #: Items of which the query holds, by the concepts
    wanted: np.ndarray | None = None  #: ``(n,) bool`` which are right, where that is known
    quality: dict[str, dict[str, Any]] = {}  #: ``{way: figures}`` with their intervals, where it is


def phrase(query: Query) -> str:
    """A query in plain words: ``red & ~circle`` is "red and not circle".

    Raises:
        InputError: A latent without a name, or what has no words.
    """
    if query.op == "name":
        return query.name.strip("*?")
    if query.op == "~":
        return f"not {phrase(query.parts[0])}"
    if query.op in ("&", "|"):
        return f" {'and' if query.op == '&' else 'or'} ".join(map(phrase, query.parts))
    raise InputError(f"{query} has no words for a text encoder: dense retrieval needs names alone, with &, | and ~")


def dense_scores(query: Query, images: np.ndarray, embed: Callable[[list[str]], np.ndarray]) -> dict[str, np.ndarray]:
    """Three dense ways of answering a query.

    Args:
        query: Of names, with ``&``, ``|`` and ``~``.
        images: ``(n, d)`` unit embeddings of the items.
        embed: ``(m, d)`` unit embeddings of phrases.

    Returns:
        ``{way: (n,)}`` for the ways of :data:`DENSE`.
    """
    words = list(dict.fromkeys(leaf.name.strip("*?") for leaf in query.leaves()))
    found = images @ embed([phrase(query), *words]).T
    cosine = {w: found[:, i + 1] for i, w in enumerate(words)}
    logic = _logic(query, {w: on_grid(_percentile(c)) for w, c in cosine.items()})
    return dict(zip(DENSE, (found[:, 0], _sum(query, cosine, 1.0), logic), strict=True))


def held_then_dense(holds: np.ndarray, dense: np.ndarray) -> np.ndarray:
    """``(n,)`` scores by which items of which a query holds come first, and in either part those that are best by a
    dense way.
    """
    return (holds + _percentile(dense)) / 2


def _percentile(x: np.ndarray) -> np.ndarray:
    return np.searchsorted(np.sort(x), x, "right") / len(x)


def _sum(query: Query, cosine: Mapping[str, np.ndarray], sign: float) -> np.ndarray:
    if query.op == "name":
        return sign * cosine[query.name.strip("*?")]
    turned = -sign if query.op == "~" else sign
    return np.sum([_sum(p, cosine, turned) for p in query.parts], 0)


def _logic(query: Query, share: Mapping[str, np.ndarray]) -> np.ndarray:
    if query.op == "name":
        return share[query.name.strip("*?")]
    parts = [_logic(p, share) for p in query.parts]
    return 1 - parts[0] if query.op == "~" else (np.minimum if query.op == "&" else np.maximum).reduce(parts)


def true_of(query: Query, attributes: Sequence[Sequence[str]]) -> np.ndarray:
    """``(n,) bool``: of which items a query holds when their attributes are its names.

    Args:
        query: Of names.
        attributes: What is true of each item.

    Raises:
        InputError: A name that no item has, or something else than names.
    """
    from scipy.sparse import csr_matrix

    from mmsae.metrics.concepts.inverted import InvertedLists

    if any(leaf.op == "latent" for leaf in query.leaves()) or query.calls():
        raise InputError(f"{query}: truth knows names alone; word the query over the truth with --truth-queries")
    names = sorted({a for own in attributes for a in own})
    number = {a: i for i, a in enumerate(names)}
    row = [i for i, own in enumerate(attributes) for _ in set(own)]
    col = [number[a] for own in attributes for a in set(own)]
    table = csr_matrix((np.ones(len(row), np.float32), (row, col)), shape=(len(attributes), max(len(names), 1)))
    leaves = {leaf.modality for leaf in query.leaves()}
    lists = InvertedLists.of(table)
    try:
        return evaluate(query, dict.fromkeys(leaves | {""}, lists), names=dict(enumerate(names)), holds=True)
    except InputError as e:
        some = f"{', '.join(names[:SOME])}{', ...' if len(names) > SOME else ''}"
        raise InputError(
            f"{query} asks for what no item's truth has; of {len(names)} it has {some}: word the query over the truth "
            "with --truth-queries"
        ) from e


def concept_scores(
    query: Query, codes: Mapping[str, LatentLists], areas: CorpusAreas | None = None
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """``{way: (n,)}`` scores of both ways by concepts, and ``(n,) bool`` whether the query holds.

    With ``areas``, which a query with ``count``, ``left_of`` or ``overlap`` needs, it holds only of items whose areas
    are known, and others score 0.
    """
    score, holds = (evaluate(query, codes, areas=areas, holds=crisp) for crisp in (False, True))
    if areas is not None:
        score, holds = score * areas.known, holds & areas.known
    return {CONCEPTS: score, HELD: (holds + score.astype(np.float64)) / 2}, holds


def judge(scores: Mapping[str, np.ndarray], wanted: np.ndarray, k: int, draws: int, seed: int = 0) -> dict[str, Any]:
    """Quality of several rankings of the same items, with intervals, and how far concepts are above each dense way.

    ``{way: {average_precision, precision, ndcg, each with its interval as low and high}}``; dense ways have
    ``concepts_above``, ``held_above`` and ``both_above``, the average precision of the ways by concepts less their own.
    """
    drawn = {way: ranking_draws(s, wanted, k, draws, seed) for way, s in scores.items()}
    out: dict[str, Any] = {}
    for way, s in scores.items():
        out[way] = {}
        for i, (figure, value) in enumerate(zip(RankingQuality._fields, ranking_quality(s, wanted, k), strict=True)):
            low, high = draws_interval(drawn[way][:, i])
            out[way][figure] = {"value": value, "low": low, "high": high}
        if way in DENSE and CONCEPTS in scores:
            for own, name in ((CONCEPTS, "concepts_above"), (HELD, "held_above"), (BOTH, "both_above")):
                if own in scores:
                    low, high = draws_interval(drawn[own][:, 0] - drawn[way][:, 0])
                    by = out[own]["average_precision"]["value"] - out[way]["average_precision"]["value"]
                    out[way][name] = {"value": by, "low": low, "high": high}
    return out
