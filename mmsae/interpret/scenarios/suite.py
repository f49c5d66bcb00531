"""A test suite of situations: their most different items with controls that lack one concept, written as shards."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mmsae.interpret.scenarios.concepts import Concepts
from mmsae.metrics.statistics import wilson
from mmsae.shards import FaultLog, Sample, ShardWriter, expand, read_shards
from mmsae.types import InputError

if TYPE_CHECKING:
    from scipy.sparse import csc_matrix, csr_matrix

PREFIX, FIELD = "suite", "suite"


class Entry(NamedTuple):
    """One item of a suite."""

    item: int
    slice: str  #: The situation, as a query
    role: str  #: ``slice`` or ``control``
    of: int = -1  #: Of a control: which item it is the control of
    dropped: str = ""  #: Of a control: the concept that it lacks
    off_by: int = -1  #: Of a control: how many other concepts differ; 0 is a minimal pair. -1: a pair of the data's own


def farthest_points(codes: csr_matrix, k: int) -> np.ndarray:
    """``(<= k,)`` rows that are far from each other: the first, then always the one farthest from those chosen.

    Distances are cosines of ``codes (m, d)``; it is the greedy 2-approximation of the k-centre problem.
    """
    norm = np.sqrt(np.asarray(codes.multiply(codes).sum(1), float).ravel())
    chosen: list[int] = []
    nearest = np.full(codes.shape[0], -np.inf)
    for _ in range(min(k, codes.shape[0])):
        free = np.ones(len(nearest), bool)
        free[chosen] = False
        best = int(np.flatnonzero(free)[nearest[free].argmin()])
        chosen.append(best)
        cos = (codes @ codes[best].T).toarray().ravel() / np.maximum(norm * norm[best], 1e-12)
        nearest = np.maximum(nearest, cos)
    return np.array(chosen, int)


def controls(
    concepts: Concepts, items: np.ndarray, parts: Sequence[int], dropped: int, allowed: np.ndarray,
    pair: np.ndarray | None = None,
) -> list[tuple[int, int]]:  # fmt: skip
    """For each item the one that is most like it, but lacks one concept of its situation.

    Args:
        concepts: The table.
        items: ``(k,)`` items of the situation.
        parts: Places of the situation's concepts.
        dropped: Which of them the controls lack; all others they have.
        allowed: ``(n,) bool`` items that may be controls.
        pair: ``(n,)`` number that the two items of a minimal pair of the data's own share, -1 for none: where an
            item's partner lacks the concept and is allowed, it is the control.

    Returns:
        ``(control, number of other concepts that differ)`` of each item, ``(-1, -1)`` where there is none; no item is
        the control of two.
    """
    table = concepts.table
    has = {c: table[:, [c]].toarray().ravel() for c in parts}
    fit = allowed & ~has[dropped]
    partner: dict[int, int] = {}
    if pair is not None:
        of = defaultdict(list)
        for i in np.flatnonzero(fit & (pair >= 0)).tolist():
            of[pair[i]].append(i)
        partner = {int(i): of[pair[i]][0] for i in items if pair[i] >= 0 and of.get(pair[i])}
    for c in parts:
        fit = fit & (has[c] if c != dropped else True)
    pool = np.flatnonzero(fit)
    rows = table.tocsr().astype(np.int32)
    size = np.diff(rows.indptr)
    shared = (rows[items] @ rows[pool].T).toarray()
    other = size[items][:, None] - 1 + size[pool][None] - 2 * shared  # the dropped one is in the item only
    used = set(partner.values())
    out = []
    for row, item in enumerate(items.tolist()):
        if item in partner:
            out.append((partner[item], -1))
            continue
        order = np.argsort(other[row], kind="stable")
        best = next((k for k in order.tolist() if int(pool[k]) not in used), None)
        if best is None:
            out.append((-1, -1))
        else:
            used.add(int(pool[best]))
            out.append((int(pool[best]), int(other[row][best])))
    return out


def build_suite(
    concepts: Concepts, codes: csr_matrix, slices: Sequence[Sequence[int]], k: int, *,
    allowed: np.ndarray, pair: np.ndarray | None = None, seed: int = 0,
) -> list[Entry]:  # fmt: skip
    """Items and controls of situations; the same arguments give the same suite.

    Args:
        concepts: The table.
        codes: ``(n, d)`` pooled codes, by which items differ.
        slices: Places of each situation's concepts.
        k: Items a situation.
        allowed: ``(n,) bool`` items that the suite may hold.
        pair: Minimal pairs of the data, see :func:`controls`.
        seed: Which item a situation starts with.
    """
    rng = np.random.default_rng(seed)
    out: list[Entry] = []
    table = concepts.table
    for parts in slices:
        on = allowed.copy()
        for c in parts:
            on &= table[:, [c]].toarray().ravel()
        own = rng.permutation(np.flatnonzero(on))
        lacks = _lacking(table, own, parts, allowed & ~on, pair)  # items with a pair of their own come first
        first = own[lacks >= 0]
        chosen = first[farthest_points(codes[first], k)]
        rest = own[lacks < 0]
        chosen = np.concatenate([chosen, rest[farthest_points(codes[rest], k - len(chosen))]])
        name = concepts.said(np.array(parts))
        out += [Entry(int(i), name, "slice") for i in chosen]
        drop = np.arange(len(chosen)) % len(parts)  # every concept is dropped for its share of the others
        known = lacks[_places(own, chosen)]
        drop = np.where(known >= 0, known, drop)
        for at, dropped in enumerate(parts):
            some = chosen[drop == at]
            found = controls(concepts, some, parts, dropped, allowed & ~on, pair)
            out += [
                Entry(c, name, "control", int(i), concepts.names[dropped], off)
                for i, (c, off) in zip(some, found, strict=True)
                if c >= 0
            ]
    return out


def _places(of: np.ndarray, which: np.ndarray) -> np.ndarray:
    """Where some values stand in an array that has each once."""
    order = np.argsort(of)
    return order[np.searchsorted(of[order], which)] if len(of) else np.zeros(0, int)


def _lacking(
    table: csc_matrix, items: np.ndarray, parts: Sequence[int], allowed: np.ndarray, pair: np.ndarray | None
) -> np.ndarray:  # fmt: skip
    """``(k,)`` which of a situation's concepts an item's own partner lacks, while it has the others; -1 for none."""
    out = np.full(len(items), -1)
    if pair is None or not len(items):
        return out
    has = table[:, list(parts)].toarray()
    fit = np.flatnonzero(allowed & (pair >= 0) & (has.sum(1) == len(parts) - 1))
    number, first = np.unique(pair[fit], return_index=True)
    at = np.searchsorted(number, pair[items]).clip(max=max(len(number) - 1, 0))
    some = (number[at] == pair[items]) if len(number) else np.zeros(len(items), bool)
    out[some] = (~has[fit[first[at[some]]]]).argmax(1)
    return out


def read_pairs(shards: Sequence[str], uids: Sequence[str], field: str) -> np.ndarray:
    """``(n,) int64`` the number in a field of the samples' json, -1 where it has none.

    Raises:
        InputError: No sample has it.
    """
    at, out = {u: i for i, u in enumerate(uids)}, np.full(len(uids), -1, np.int64)
    for sample in read_shards(expand(list(shards)), FaultLog(), need=(), decode=False):
        value = sample.meta.get(field)
        if sample.uid in at and isinstance(value, int) and not isinstance(value, bool):
            out[at[sample.uid]] = value
    if (out < 0).all():
        raise InputError(f"no sample of {len(uids):,} has a whole number in the json field {field!r}, which is to say "
                         "what is a pair")  # fmt: skip
    return out


def write_suite(
    out: Path, entries: Sequence[Entry], shards: Sequence[str], uids: Sequence[str], per_shard: int = 1000
) -> int:  # fmt: skip
    """Write the samples of a suite as shards, as they are but for ``suite`` in their json; returns how many.

    ``suite`` is a list of what an item is there for: ``slice``, ``role``, and of controls ``of`` (a uid), ``dropped``
    and ``off_by``.

    Raises:
        InputError: A sample is not in the shards.
    """
    wanted: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for e in entries:
        said: dict[str, Any] = {"slice": e.slice, "role": e.role}
        if e.role == "control":
            said |= {"of": uids[e.of], "dropped": e.dropped, "off_by": e.off_by}
        wanted[uids[e.item]].append(said)
    missing = set(wanted)
    with ShardWriter(out, PREFIX, per_shard=per_shard) as writer:
        for sample in read_shards(expand(list(shards)), FaultLog(), need=(), decode=False):
            if sample.uid not in missing:
                continue
            missing.remove(sample.uid)
            meta = {**sample.meta, "uid": sample.uid, FIELD: wanted[sample.uid]}
            writer.write(sample.uid, {**{k: v for k, v in sample.raw.items() if k != "json"}, "json": meta})
        if missing:
            raise InputError(f"{len(missing)} of {len(wanted)} samples of the suite are not in the shards, first "
                             f"{min(missing)}: were they moved since the evidence was collected?")  # fmt: skip
    return len(wanted)


class SliceAccuracy(NamedTuple):
    """How a model does on one situation and on its controls."""

    slice: str
    accuracy: float
    low: float  #: Of a 95 % interval (Wilson)
    high: float
    n: int
    control: float  #: Accuracy on the controls
    control_low: float
    control_high: float
    n_control: int


def suite_accuracy(
    folder: str | Path, right: Callable[[Sample], bool], slices: Collection[str] = ()
) -> list[SliceAccuracy]:  # fmt: skip
    """Accuracy of any model on a suite.

    Args:
        folder: What :func:`write_suite` wrote.
        right: Whether the model is right on a sample, whose ``image``, ``caption`` and ``meta`` it may read.
        slices: Only these.

    Raises:
        InputError: No shards of a suite.
    """
    tally: Mapping[str, dict[str, list[int]]] = defaultdict(lambda: {"slice": [0, 0], "control": [0, 0]})
    for sample in _samples(folder):
        ok = bool(right(sample))
        for said in sample.meta[FIELD]:
            if not slices or said["slice"] in slices:
                tally[said["slice"]][said["role"]][0] += ok
                tally[said["slice"]][said["role"]][1] += 1
    out = []
    for name, sides in tally.items():
        figures: list[Any] = []
        for side in ("slice", "control"):
            hits, n = sides[side]
            figures += [hits / n if n else float("nan"), *wilson(hits, n), n]
        out.append(SliceAccuracy(name, *figures))
    return out


def _samples(folder: str | Path) -> Iterator[Sample]:
    for sample in read_shards(expand(str(Path(folder) / f"{PREFIX}-*.tar")), FaultLog(), need=("image", "json")):
        if FIELD in sample.meta:
            yield sample
