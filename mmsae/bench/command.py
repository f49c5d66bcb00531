"""``mmsae bench``: claims of papers, tested end to end where the truth is known."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mmsae.bench.filter.arms import ARMS, QUICK
from mmsae.errors import InputError


@dataclass(frozen=True)
class FilterBench:
    """``filter``: which halves of an alignment set, and of what."""

    arms: tuple[str, ...] = ARMS
    """What to fine-tune on: ``all``, ``random``, ``oracle`` and halves by any of the scores."""
    damage: float = 0.4
    """Share of damaged samples, above 0 and at most .5."""
    clip: str | None = None
    """Folder of ``mmsae pretrain-clip`` on the generated world; default: one is trained."""

    def __post_init__(self) -> None:
        if not 0 < self.damage <= 0.5:
            raise InputError(
                f"damage is {self.damage}; it must be above 0 and at most 0.5, so that half of the set is clean"
            )
        for arm in set(self.arms) - set(ARMS):
            raise InputError(f"arms: there is no {arm}; there are {', '.join(ARMS)}")
        if "all" not in self.arms:
            raise InputError(
                f"arms: all must be among {', '.join(self.arms) or 'them'}: the others are compared with it"
            )


@dataclass(frozen=True)
class RecoverBench:
    """``recover``: which SAEs, on which worlds."""

    variants: tuple[str, ...] = ()
    """Recipes of ``configs/sae`` by name, and controls; default: all."""
    worlds: tuple[str, ...] = ()
    """Worlds by name; default: all."""
    sae_steps: int = 2000
    """Steps of every training."""


def bench(
    name: Literal["filter", "recover"],
    out: str = "",
    quick: bool = False,
    seeds: list[int] = [0, 1, 2],  # noqa: B006 (jsonargparse shows it)
    progress: bool = True,
    alignment: FilterBench = FilterBench(),
    recover: RecoverBench = RecoverBench(),
) -> dict[str, Any]:
    """Test published claims where the truth is known, on the CPU.

    ``filter``: one base model (a tiny LLaVA that is half trained) is fine-tuned on all of an alignment set of which a
    known share is damaged, and on the half that each score ranks first; all arms take equally many steps. ``recover``:
    every SAE of ``configs/sae`` is trained on activations whose dictionary and codes are known.

    Args:
        name: Which benchmark.
        out: Folder for everything; the same command goes on where it was interrupted. Default: ``runs/bench_NAME``.
        quick: One seed, and of ``filter`` four arms, of ``recover`` two worlds and a quarter of the steps.
        seeds: Seeds of trainings and of what is drawn; ``quick`` takes the first.
        progress: Say what is done.
        alignment: Of ``filter``.
        recover: Of ``recover``.

    Returns:
        The results, which are also in OUT/results.json.
    """
    if not seeds:
        raise InputError("seeds: at least 1 is needed, got 0")
    root, seeds = Path(out or f"runs/bench_{name}"), seeds[:1] if quick else seeds
    if name == "filter":
        from mmsae.bench.filter.run import Sizes, bench_filter

        return bench_filter(
            root, Sizes(), QUICK if quick else alignment.arms, seeds, alignment.damage, alignment.clip, progress
        )
    from mmsae.bench.recover.run import bench_recover

    worlds = recover.worlds or (("independent", "hierarchical") if quick else ())
    steps = recover.sae_steps // 4 if quick else recover.sae_steps
    return bench_recover(root, recover.variants, worlds, seeds, steps, progress)
