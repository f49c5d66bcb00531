"""``mmsae bench recover``: every SAE of ``configs/sae`` on every world whose dictionary is known, and FAST."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from mmsae.bench.recover.fast import NAME as TOKENS
from mmsae.bench.recover.fast import FastSizes, fast_rows
from mmsae.bench.recover.models import LR, ROWS, TUNING_SEED, Variant, WorldRows, chosen_strength, figures, variants
from mmsae.bench.recover.report import write_recover_report
from mmsae.bench.recover.worlds import WORLDS
from mmsae.bench.stages import stages_of
from mmsae.bench.summary import over_seeds
from mmsae.errors import InputError
from mmsae.files import write_json
from mmsae.jobs.stages import Stages

SECONDS = 3e-3  #: Of one step, about, for the estimate.
TOKENS_MINUTES = 4  #: Of the conversations, models included.


def bench_recover(
    root: Path,
    names: Sequence[str] = (),
    worlds: Sequence[str] = (),
    seeds: Sequence[int] = (0, 1, 2),
    steps: int = 800,
    progress: bool = True,
    tokens: FastSizes = FastSizes(),
) -> dict[str, Any]:
    """The benchmark at any size; a folder may be gone on with by more variants, worlds and seeds.

    Args:
        root: Folder of results.
        names: Variants; none: all.
        worlds: Worlds; none: all, and the conversations of :mod:`mmsae.bench.recover.fast`.
        seeds: Of worlds and trainings.
        steps: Of every training.
        progress: Whether to print what is done.
        tokens: Sizes of the conversations and of the SAEs on their tokens.

    Raises:
        InputError: A variant or world that there is not.
    """
    known, places = variants(), (*WORLDS, TOKENS)
    for what, given, there in (("variants", names, known), ("worlds", worlds, places)):
        if odd := [name for name in given if name not in there]:
            raise InputError(f"{what}: there is no {odd[0]}; there are {', '.join(there)}")
    chosen = {name: known[name] for name in names or known}
    asked = worlds or places
    worlds = [w for w in asked if w != TOKENS]
    todo = [(w, v) for w in worlds for v in chosen if chosen[v].fits(w)]
    stages = stages_of(root, {"bench": "recover", "steps": steps, "rows": ROWS, "lr": LR}, progress=False)
    if progress:
        minutes = len(todo) * len(seeds) * steps * SECONDS / 60 + TOKENS_MINUTES * (TOKENS in asked)
        print(
            f"mmsae bench recover: {len(chosen)} variants, {len(asked)} worlds, {len(seeds)} seeds, {steps} "
            f"steps each. About {minutes:.0f} minutes of one core, and the choice of strengths; {root}",
            flush=True,
        )
    start, results = time.perf_counter(), {w: {} for w in worlds}
    for world, name in todo:
        results[world][name] = row = _row(stages, world, name, chosen[name], seeds, steps)
        if progress:
            said = ", ".join(f"{k} {row[k]:.3f}" for k in ("cosine", "fvu", "l0", "dead"))
            print(f"[{time.perf_counter() - start:.0f} s] {world}, {name}: {said}", flush=True)
    rows = fast_rows(stages, list(chosen), seeds, steps, tokens, progress) if TOKENS in asked else {}
    found = {"seeds": list(seeds), "steps": steps, "rows": ROWS, "lr": LR, "worlds": results, TOKENS: rows}
    write_json(root / "results.json", found)
    report = write_recover_report(root, found, {w: WORLDS[w](0).about for w in results})
    return {**found, "out": str(report)}


@lru_cache(maxsize=5)  # a world's rows serve all variants, one after the other
def _rows(world: str, seed: int) -> WorldRows:
    return WorldRows.draw(WORLDS[world], seed)


def _row(stages: Stages, world: str, name: str, variant: Variant, seeds: Sequence[int], steps: int) -> dict[str, float]:
    """Figures of one variant on one world over all seeds; what was measured earlier is read."""
    strength = 1.0
    if variant.has_strength:
        strength = stages.run(
            f"strengths/{world}-{variant.recipe.stem}",
            lambda: chosen_strength(variant, _rows(world, TUNING_SEED), steps),
        )

    def once(seed: int) -> dict[str, float]:
        return stages.run(f"runs/{world}-{name}-{seed}", lambda: figures(variant, _rows(world, seed), steps, strength))

    return over_seeds([once(seed) for seed in seeds])
