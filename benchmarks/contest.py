"""Who can do a problem, whether they agree with the dense formula, and a table of their times."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from benchmarks.measure import Options, Result, Timing, first_line, interleave, timing_table
from benchmarks.methods import (
    Contender,
    Exact,
    Naive,
    NaiveHalf,
    Ours,
    Problem,
    codes_agreement,
    exact_codes,
    exact_step,
    step_agreement,
    tolerated,
)
from benchmarks.peers import peers

CHECKED_ROWS = 256
# the formula's figures of some rows, and how far a contender is from them
Check = tuple[Callable[[Problem, str, int], Exact], Callable[[Contender, Exact], dict[str, Any]]]
STEP: Check = (exact_step, step_agreement)
CODES: Check = (exact_codes, codes_agreement)


def ours(problem: Problem, options: Options) -> Iterator[tuple[str, str]]:
    """``(backend, precision)`` of mmsae's contenders; empty: what the device has by default."""
    yield "", ""
    if options.quick:
        yield "reference", ""
    if options.cuda:
        yield "torch", ""
    elif options.quick and problem.method == "topk" and os.environ.get("TRITON_INTERPRET") == "1":
        yield "triton", ""  # takes seconds; tests/kernels has the other methods
    if problem.method != "mp":  # mp chooses atoms in float32 at least
        yield "", "bf16"
        if options.cuda:
            yield "", "fp32"


def makers(problem: Problem, options: Options) -> Iterator[tuple[str, Callable[[], Contender]]]:
    """``(name, how it is made)`` of everybody who has the method."""
    for backend, precision in ours(problem, options):
        name = " ".join(p for p in ("mmsae", backend, precision) if p)
        yield name, partial(Ours, problem, options.device, backend, precision)
    half = [] if problem.method in ("vl_sae", "mp") else [NaiveHalf]
    for kind in (Naive, *half, *peers(problem)):
        yield kind.name, partial(kind, problem, options.device)


def field(problem: Problem, options: Options, check: Check) -> tuple[dict[str, Contender], dict[str, Timing]]:
    """Contenders that can be made, and what is known of all of them: how far they are from the formula, or why not."""
    found: dict[str, Contender] = {}
    said: dict[str, Timing] = {}
    formula, agreement = check
    exact = formula(problem, options.device, min(CHECKED_ROWS, problem.batch))
    for name, make in makers(problem, options):
        if any(part in name for part in options.skip):
            continue
        said[name] = timing = Timing()
        try:
            contender = make()
            timing.extra = agreement(contender, exact)
        except Exception as error:  # another library may raise anything; mmsae's own failures fail the benchmark
            timing.note = f"skipped: {first_line(error)}"
            continue
        worst = max(v for v in timing.extra.values() if isinstance(v, float))
        timing.extra |= {"agrees": worst <= tolerated(contender, options.cuda), "error": f"{worst:.1e}"}
        if not timing.extra["agrees"]:
            timing.note = "disagrees with the formula"
        elif missing := timing.extra.get("without"):
            timing.note = f"has no {', '.join(missing)}"
        found[name] = contender
    return found, said


def contest(
    result: Result,
    case: str,
    runs: Mapping[str, Callable[[], Any]],
    said: Mapping[str, Timing],
    floors: Mapping[str, Callable[[], Any]] | None = None,
    warm: int = 2,
    computed: Callable[[Mapping[str, Timing]], dict[str, float]] = lambda timings: {},
    **facts: Any,
) -> bool:
    """Time contenders with floors beside them, and add the case to a result.

    Args:
        result: Where it goes.
        case: Its name.
        runs: What is timed.
        said: What is known of the contenders already, and of those that are not timed.
        floors: Timed in the same rounds.
        warm: Runs before the first round.
        computed: From the timings, milliseconds by name that are computed from them and stand in the table, too.
        facts: Further ones for the result's file.

    Returns:
        False where a contender of mmsae's has no figures or disagrees with the formula.
    """
    timings = interleave(dict(runs) | dict(floors or {}), result.options, warm)
    for name, timing in said.items():
        own = timings.setdefault(name, Timing())
        own.extra, own.memory, own.note = timing.extra, timing.memory, own.note or timing.note
    timings |= {name: Timing([ms], note="computed") for name, ms in computed(timings).items()}
    result.add(case, timing_table(timings, "mmsae", ["error"]), timings, **facts)
    return all(t.ms and t.extra.get("agrees") for name, t in timings.items() if name.startswith("mmsae"))
