"""The result of the parts of a filter job: the global choice, the tables, the uid list and the filtered shards.

One process, in the order of the tars; memory is a few numbers per sample (and, for a chosen set, its codes).
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm import tqdm

from mmsae.files import atomic_file
from mmsae.filtering.passes import TargetSet, read_items
from mmsae.filtering.query import QueryResult
from mmsae.filtering.selection import Items, Objective, State, concatenate, distribution, kl, lazy_greedy, quota
from mmsae.filtering.selection_exchange import exchange
from mmsae.jobs.units import Parts
from mmsae.metrics.statistics import spearman
from mmsae.shards import FaultLog, ShardWriter, UidSet, disk_errors, draw, group_uid, groups
from mmsae.shards.decode import parse_json
from mmsae.shards.names import safe_key
from mmsae.types import InputError

TEXT_COLUMNS = ("uid", "key", "shard", "caption")
DATACOMP = np.dtype("u8,u8")
SMOOTH = 0.01  # share of a target's distribution that is spread evenly: a few hundred items leave latents without mass


class ScoredSamples(NamedTuple):
    """All samples of a job, without their texts."""

    uids: np.ndarray  #: ``(N,)`` str, in the order of the tars.
    numbers: dict[str, np.ndarray]  #: ``{column: (N,) float}``: words, scores, counts.
    sizes: list[int]  #: Samples of each part.

    @property
    def starts(self) -> list[int]:
        """Number of the first sample of each part, and of all of them last."""
        return [0, *np.cumsum(self.sizes).tolist()]


def read_samples(parts: Sequence[Path]) -> ScoredSamples:
    """The numbers of all parts.

    Raises:
        InputError: A uid occurs twice, or there is no usable sample at all.
    """
    seen, uids, tables, sizes = UidSet(), [], [], []
    for path in parts:
        names = pq.read_schema(path).names
        if "words" not in names:  # no usable sample in this tar
            sizes.append(0)
            continue
        wanted = [n for n in names if not n.endswith(("_latents", "_strengths", "caption")) and "." not in n]
        table = pq.read_table(path, columns=wanted)
        for row in zip(*(table[c].to_pylist() for c in ("uid", "shard", "key")), strict=True):
            seen.add(*row)
        uids += table["uid"].to_pylist()
        tables.append(table.drop_columns(["uid", "shard", "key"]))
        sizes.append(len(table))
    if not uids:
        raise InputError(f"not one usable sample in {len(parts)} shards")
    table = pa.concat_tables(tables)
    return ScoredSamples(np.array(uids, dtype="U32"), {c: table[c].to_numpy() for c in table.column_names}, sizes)


def budget(n: int, keep: float) -> int:
    """Samples kept of n."""
    return math.ceil(round(keep * n, 9))  # .3 of 10 is 3, not 4


def best(samples: ScoredSamples, score: str, b: int, among: np.ndarray | None = None) -> np.ndarray:
    """``(b,)`` the samples with the highest score, best first; ties go to the lower uid. ``among (N,)`` says which
    samples may be chosen; default: all.
    """
    order = np.lexsort((samples.uids, -samples.numbers[score]))
    return (order if among is None else order[among[order]])[:b]


def write_scores(
    path: Path,
    parts: Sequence[Path],
    samples: ScoredSamples,
    kept: np.ndarray,
    order: np.ndarray,
    label: Callable[[int], str],
    query: QueryResult | None = None,
) -> None:
    """``scores.parquet``: every usable sample with all scores, whether it is kept, and why.

    ``parts`` are those of the ``score`` pass; ``kept (N,)`` is bool, ``order (N,)`` a place in the order of choice or
    -1, ``label`` says what to call a latent, and ``query`` what a query says of the samples.
    """
    labels: dict[int, str] = {}
    with disk_errors(path), atomic_file(path) as temp:
        writer = None
        for file, lo, hi in zip(parts, samples.starts, samples.starts[1:], strict=False):
            if hi == lo:
                continue
            table = pq.read_table(file).replace_schema_metadata(None)
            table = table.drop_columns([c for c in table.column_names if c.startswith("code_") or "." in c])
            at = table.column_names.index("words")
            table = table.add_column(at, "kept", pa.array(kept[lo:hi]))
            table = table.add_column(at + 1, "order", pa.array(order[lo:hi], pa.int32()))
            if query is not None:
                table = table.add_column(at + 2, "query_holds", pa.array(query.holds[lo:hi]))
                table = table.add_column(at + 3, "query", pa.array(query.score[lo:hi]))
            for side in ("text_only", "image_only"):
                ids = table[f"{side}_latents"].combine_chunks()
                words = [labels.setdefault(j, label(j)) for j in ids.flatten().to_pylist()]
                named = pa.ListArray.from_arrays(ids.offsets, pa.array(words, pa.string()))
                table = table.add_column(table.column_names.index(f"{side}_latents"), side, named)
            if writer is None:
                writer = pq.ParquetWriter(temp, table.schema, compression="zstd")
            writer.write_table(table)
        writer.close()


def write_uids(path: Path, uids: Sequence[str]) -> None:
    """DataComp's list of uids: ``u8,u8``, the halves of 128 bits, sorted."""
    pairs = np.array([(int(u[:16], 16), int(u[16:], 16)) for u in uids], dtype=DATACOMP)
    pairs.sort()
    with disk_errors(path), atomic_file(path) as temp, open(temp, "wb") as file:
        np.save(file, pairs)


def reshard(
    paths: Sequence[str],
    samples: ScoredSamples,
    kept: np.ndarray,
    out: Path,
    per_shard: int,
    compress: bool,
    progress: bool,
) -> int:
    """Write the kept samples as ``out/kept-NNNNNN.tar``, and return how many there are. Members are unchanged.

    A key that would unpack elsewhere is written as ``safe_key`` says.
    A shard ends after ``per_shard`` samples, or before a key that it has already (data sets often number their keys
    anew in every tar). A shard that is there is whole, so a killed job goes on after the last one.
    """
    out.mkdir(parents=True, exist_ok=True)
    writer, keys, shard = None, set(), -1
    suffix = ".tar.gz" if compress else ".tar"
    bar = tqdm(desc="write shards", unit="sample", total=int(kept.sum()), disable=not progress)
    with bar, ExitStack() as stack:
        for path, lo, hi in zip(paths, samples.starts, samples.starts[1:], strict=False):
            wanted = set(samples.uids[lo:hi][kept[lo:hi]].tolist())
            for group in groups(path, FaultLog()) if wanted else ():
                key, raw, spelled = group.key, group.raw, group.spelled
                meta = parse_json(raw["json"])[0] if "json" in raw else None
                if (uid := group_uid(path, group, meta or {})) not in wanted:
                    continue
                wanted.discard(uid)
                key = safe_key(key)
                if shard < 0 or len(keys) == per_shard or key in keys:
                    stack.close()  # the shard that is full takes its name
                    shard, keys, writer = shard + 1, set(), None
                    if not (out / f"kept-{shard:06d}{suffix}").exists():
                        writer = ShardWriter(out, "kept", per_shard, compress)
                        writer.n = shard * per_shard  # it numbers its shards by this
                        stack.enter_context(writer)
                keys.add(key)
                if writer is not None:
                    writer.write(key, {spelled[field]: data for field, data in raw.items()})
                bar.update()
            if wanted:
                raise InputError(f"{path} has changed since it was scored: {len(wanted)} of its samples are not in it")
    return shard + 1


def rank_correlations(columns: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """Rank correlation of every column with every other; NaN (left out) where one is constant."""
    names = [c for c, v in columns.items() if len(np.unique(v)) > 1]
    if not names:
        return {}
    values = torch.from_numpy(np.stack([columns[c] for c in names], 1).astype(np.float64))
    table = spearman(values, values)
    return {a: {b: round(table[i, j].item(), 6) for j, b in enumerate(names)} for i, a in enumerate(names)}


def summary(values: np.ndarray) -> dict[str, Any]:
    """Mean, spread and quantiles of a column."""
    q = np.quantile(values, [0, 0.05, 0.25, 0.5, 0.75, 0.95, 1])
    names = ("min", "p05", "p25", "median", "p75", "p95", "max")
    return {"mean": float(values.mean()), "std": float(values.std())} | dict(zip(names, q.tolist(), strict=True))


class SetChoice(NamedTuple):
    """What to choose from, and how."""

    candidates: Parts  #: Part files of the first stage, which chooses in each tar.
    parts: list[Path]  #: The tars' parts of the ``score`` pass.
    samples: ScoredSamples  #: All samples.
    objective: Objective  #: What a set is worth.
    bins: np.ndarray  #: ``(N,)`` quality bin of every sample.
    fired: bool  #: Whether codes count as 1 where they fired (coverage).
    keep: float  #: Share of all samples that will be chosen.
    seed: int  #: Seed of the random control.
    swap: bool = False  #: Whether the greedy choice is made better by swaps, for a target.

    def items(self) -> Iterator[tuple[int, Items]]:
        """``(number of its first sample, codes)`` of every tar in order; one tar in memory at a time."""
        starts = self.samples.starts
        for path, lo, hi in zip(self.parts, starts, starts[1:], strict=False):
            items = read_items(path, self.bins[lo:hi])
            yield lo, items.fired() if self.fired else items


def quality_bins(samples: ScoredSamples, score: str) -> np.ndarray:
    """``(N,)`` worst, middle and best third (0, 1, 2) by a score."""
    order = np.lexsort((samples.uids, samples.numbers[score]))
    bins = np.empty(len(order), dtype=np.int64)
    bins[order] = np.arange(len(order)) * 3 // len(order)
    return bins


def choose_set(
    choice: SetChoice, goal: TargetSet | None, b: int, progress: bool = True
) -> tuple[np.ndarray, dict[str, Any]]:
    """The b samples to keep, beside what a random and a modular choice of as many would have given.

    Returns ``(b,)`` samples of the job in the order of choice, and what to report. ``goal`` is the target of ``match``.
    """
    rows = first_stage(choice, progress)
    starts = [lo for lo, _ in choice.items()]
    pool = concatenate([items.take(r - lo) for r, (lo, items) in zip(rows, choice.items(), strict=True)])
    found = lazy_greedy(pool, choice.objective, b, progress)
    greedy = chosen = np.concatenate(rows)[found.rows]
    about: dict[str, Any] = {}
    if choice.swap:
        better = exchange(pool, choice.objective, found.rows, progress=progress)
        chosen = np.concatenate(rows)[better.rows]
        about = {"swaps": better.swaps, "rounds": better.rounds}
    sets = {"selected": chosen, **({"greedy": greedy} if choice.swap else {}), **controls(choice, b)}
    sets["everything"] = np.arange(len(choice.samples.uids))
    states = states_of(choice, sets)
    about |= {
        "candidates": pool.n,
        "tars": len(starts),
        "objective": {k: s.value() for k, s in states.items()},
        "latents_covered": {k: int((s.m > 0).sum()) for k, s in states.items()},
        "first_gain": float(found.gains[0]),
        "last_gain": float(found.gains[-1]),
    }
    if goal is not None:
        about["target_items"] = {"matched": goal.items[0], "held_out": goal.items[1]}
        about["kl"] = {k: kl(choice.objective.p, s.m) for k, s in states.items()}
        if goal.mass[1].sum() > 0:
            held = distribution(goal.mass[1], SMOOTH)
            about["kl_held_out"] = {k: kl(held, s.m) for k, s in states.items()}
    return chosen, about


def first_stage(choice: SetChoice, progress: bool = True) -> list[np.ndarray]:
    """Candidates of every tar, as samples of the job; a part file each, so that a killed job need not choose again."""
    parts, rows = choice.candidates, []
    bar = tqdm(parts.units, desc="choose in each tar", unit="tar", disable=not progress)
    for unit, (lo, items) in zip(bar, choice.items(), strict=True):
        if not parts.done(unit):
            n = quota(items.n, choice.keep)
            best = np.arange(items.n) if n == items.n else np.sort(lazy_greedy(items, choice.objective, n).rows)
            buffer = io.BytesIO()
            np.save(buffer, best)
            parts.write(unit, buffer.getvalue())
        rows.append(np.load(parts.path(unit)) + lo)
    return rows


def controls(choice: SetChoice, b: int) -> dict[str, np.ndarray]:
    """Two choices of ``b`` samples: random ones, and those with the most of the wanted concepts each for itself."""
    uids, p = choice.samples.uids, choice.objective.p
    mass = [np.zeros(0)]
    for _, items in choice.items():
        which, at = items.entries(np.arange(items.n))
        mass.append(np.bincount(which, p[items.col[at]] * items.val[at], items.n))
    return {
        "random": np.lexsort((uids, [draw(u, choice.seed) for u in uids.tolist()]))[:b],
        "modular": np.lexsort((uids, -np.concatenate(mass)))[:b],
    }


def states_of(choice: SetChoice, sets: Mapping[str, Sequence[int] | np.ndarray]) -> dict[str, State]:
    """Code mass and quality bins of some sets of samples."""
    states = {k: State(choice.objective) for k in sets}
    member = {k: np.zeros(len(choice.samples.uids), dtype=bool) for k in sets}
    for k, rows in sets.items():
        member[k][rows] = True
    for lo, items in choice.items():
        for k, state in states.items():
            some = items.take(np.flatnonzero(member[k][lo : lo + items.n]))
            state.m += some.mass(len(state.m))
            state.counts += np.bincount(some.bins, minlength=len(state.counts))
    return states
