"""Choosing the set to keep by its concepts: greedy inside every tar, then over the candidates of all of them."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from mmsae.shards import units, write_part
from mmsae.tasks.filter_merge import Scored
from mmsae.tasks.filter_passes import Target, read_items
from mmsae.tasks.selection import (
    Items,
    Objective,
    State,
    concatenate,
    distribution,
    draw,
    kl,
    lazy_greedy,
    quota,
)
from mmsae.tasks.selection_exchange import exchange

SMOOTH = 0.01  # of a target's distribution, spread evenly: a few hundred items leave latents without mass


class Choice(NamedTuple):
    """What to choose from, and how.

    Attributes:
        paths: The tars.
        parts: Their parts of the ``score`` pass.
        scored: All samples.
        objective: What a set is worth.
        bins: ``(N,)`` quality bin of every sample.
        fired: Whether codes count as 1 where they fired (coverage).
        keep: Share of all samples that will be chosen.
        seed: Of the random control.
        swap: Whether the greedy choice is made better by swaps, for a target.
    """

    paths: list[str]
    parts: list[Path]
    scored: Scored
    objective: Objective
    bins: np.ndarray
    fired: bool
    keep: float
    seed: int
    swap: bool = False

    def items(self) -> Iterator[tuple[int, Items]]:
        """``(number of its first sample, codes)`` of every tar in order; one tar in memory at a time."""
        starts = self.scored.starts
        for path, lo, hi in zip(self.parts, starts, starts[1:], strict=False):
            items = read_items(path, self.bins[lo:hi])
            yield lo, items.fired() if self.fired else items


def quality_bins(scored: Scored, score: str) -> np.ndarray:
    """``(N,)`` worst, middle and best third (0, 1, 2) by a score."""
    order = np.lexsort((scored.uids, scored.numbers[score]))
    bins = np.empty(len(order), dtype=np.int64)
    bins[order] = np.arange(len(order)) * 3 // len(order)
    return bins


def choose_set(choice: Choice, goal: Target | None, b: int, folder: Path, progress: bool = True) -> Any:
    """The b samples to keep, beside what a random and a modular choice of as many would have given.

    Args:
        choice: What to choose from.
        goal: The target, for ``match``.
        b: Samples to keep.
        folder: Of the part files of the first stage.
        progress: Whether to show bars.

    Returns:
        ``(b,)`` samples of the job in the order of choice, and what to report.
    """
    rows = first_stage(choice, folder, progress)
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
    sets["everything"] = np.arange(len(choice.scored.uids))
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


def first_stage(choice: Choice, folder: Path, progress: bool = True) -> list[np.ndarray]:
    """Candidates of every tar, as samples of the job; a part file each, so that a killed job need not choose again."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    bar = tqdm(units(choice.paths), desc="choose in each tar", unit="tar", disable=not progress)
    for unit, (lo, items) in zip(bar, choice.items(), strict=True):
        file = folder / f"{unit.name}.part"
        if not file.exists():
            n = quota(items.n, choice.keep)
            best = np.arange(items.n) if n == items.n else np.sort(lazy_greedy(items, choice.objective, n).rows)
            buffer = io.BytesIO()
            np.save(buffer, best)
            write_part(folder, unit, buffer.getvalue())
        rows.append(np.load(file) + lo)
    return rows


def controls(choice: Choice, b: int) -> dict[str, np.ndarray]:
    """As many samples at random, and those with the most of the wanted concepts each for itself."""
    uids, p = choice.scored.uids, choice.objective.p
    mass = [np.zeros(0)]
    for _, items in choice.items():
        which, at = items.entries(np.arange(items.n))
        mass.append(np.bincount(which, p[items.col[at]] * items.val[at], items.n))
    return {
        "random": np.lexsort((uids, [draw(u, choice.seed) for u in uids.tolist()]))[:b],
        "modular": np.lexsort((uids, -np.concatenate(mass)))[:b],
    }


def states_of(choice: Choice, sets: Mapping[str, Sequence[int] | np.ndarray]) -> dict[str, State]:
    """Code mass and quality bins of some sets of samples."""
    states = {k: State(choice.objective) for k in sets}
    member = {k: np.zeros(len(choice.scored.uids), dtype=bool) for k in sets}
    for k, rows in sets.items():
        member[k][rows] = True
    for lo, items in choice.items():
        for k, state in states.items():
            some = items.take(np.flatnonzero(member[k][lo : lo + items.n]))
            state.m += some.mass(len(state.m))
            state.counts += np.bincount(some.bins, minlength=len(state.counts))
    return states
