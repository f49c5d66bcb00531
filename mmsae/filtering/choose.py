"""Choosing a set of a filter job's samples, over all tars, by their codes.

The candidates of all tars are in memory together, with their codes: a greedy choice looks at each again and again.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from mmsae.allocator import free_memory
from mmsae.files import nbytes
from mmsae.filtering.columns import ScoredSamples
from mmsae.filtering.passes import TargetSet, code_entries, read_items
from mmsae.filtering.selection import Items, Objective, State, concatenate, distribution, kl, lazy_greedy, quota
from mmsae.filtering.selection_exchange import exchange
from mmsae.jobs.units import Parts
from mmsae.shards import draw
from mmsae.types import InputError

SMOOTH = 0.01  # share of a target's distribution that is spread evenly: a few hundred items leave latents without mass


def check_memory(what: str, needed: int) -> None:
    """Refuse a choice that holds something of every sample in memory where it is more than there is.

    Raises:
        InputError: With both numbers.
    """
    free = free_memory()
    if needed > free:
        raise InputError(
            f"{what} holds all samples in memory, about {nbytes(needed)}, and {nbytes(free)} are free: filter by score"
            " first (--select top, without --query), and choose among what that keeps"
        )


def set_bytes(parts: Sequence[Path], samples: ScoredSamples, keep: float) -> int:
    """About how many bytes a choice of a set takes: 300 a sample, and 48 a code entry of every candidate."""
    entries = sum(code_entries(path) for path in parts)
    return 300 * samples.n + round(48 * entries * min(1.0, quota(10**6, keep) / 10**6))


class SetChoice(NamedTuple):
    """What to choose from, and how."""

    candidates: Parts  #: Part files of the first stage, which chooses in each tar.
    parts: list[Path]  #: The tars' parts of the ``score`` pass.
    samples: ScoredSamples  #: All samples.
    uids: np.ndarray  #: ``(N,)`` str, theirs.
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


def quality_bins(uids: np.ndarray, score: np.ndarray) -> np.ndarray:
    """``(N,)`` worst, middle and best third (0, 1, 2) by a score."""
    order = np.lexsort((uids, score))
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
    sets["everything"] = np.arange(choice.samples.n)
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
    uids, p = choice.uids, choice.objective.p
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
    member = {k: np.zeros(choice.samples.n, dtype=bool) for k in sets}
    for k, rows in sets.items():
        member[k][rows] = True
    for lo, items in choice.items():
        for k, state in states.items():
            some = items.take(np.flatnonzero(member[k][lo : lo + items.n]))
            state.m += some.mass(len(state.m))
            state.counts += np.bincount(some.bins, minlength=len(state.counts))
    return states
