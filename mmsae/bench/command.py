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
    """Folder of ``mmsae pretrain-clip`` on the generated world; default: one is trained. Of ``names``, too."""

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
class SAEBench:
    """``recover`` and ``multimodal``: which SAEs."""

    variants: tuple[str, ...] = ()
    """Recipes of ``configs/sae`` by name; default: all, and controls."""
    worlds: tuple[str, ...] = ()
    """``recover``: worlds by name, and ``conversations`` (FAST); default: all."""
    sae_steps: int | None = None
    """Steps of every training; default: 800, 200 with ``quick``."""


@dataclass(frozen=True)
class NamesBench:
    """``names``: how its SAEs are read; ``--clip`` says of which CLIP they are."""

    threshold: bool = True
    """Read SAEs by a threshold, so that an image has as many latents as it needs; else by the k of their training."""


@dataclass(frozen=True)
class PhotographsBench:
    """``multimodal``: photographs beside the generated world; all three or none."""

    train: str | None = None
    """Shards of photographs with captions and classes; the last tenth is kept to choose on."""
    test: str | None = None
    """Shards that are only scored."""
    host: str | None = None
    """Host with two towers that sees them."""


def bench(
    name: Literal["filter", "recover", "multimodal", "names"],
    out: str = "",
    quick: bool = False,
    seeds: list[int] = [0, 1, 2],  # noqa: B006 (jsonargparse shows it)
    progress: bool = True,
    alignment: FilterBench = FilterBench(),
    saes: SAEBench = SAEBench(),
    photographs: PhotographsBench = PhotographsBench(),
    naming: NamesBench = NamesBench(),
) -> dict[str, Any]:
    """Test published claims where the truth is known, on the CPU.

    ``filter``: one base model (a tiny LLaVA that is half trained) is fine-tuned on all of an alignment set of which a
    known share is damaged, and on the half that each score ranks first; all arms take equally many steps. ``recover``:
    every SAE of ``configs/sae`` is trained on activations whose dictionary and codes are known, and two on tokens of a
    tiny LLaVA, from whole conversations and from packed ones. ``multimodal``: every SAE over pairs on the generated
    world in several conditions, and on photographs where they are named. ``names``: latents of SAEs on the generated
    world are named by ``mmsae name``; are the names right, and are latents of random weights left without one?

    Args:
        name: Which benchmark.
        out: Folder for everything; the same command goes on where it was interrupted. Default: ``runs/bench_NAME``.
        quick: One seed; of ``filter`` four arms, of ``recover`` two worlds and fewer steps, of ``multimodal`` a smaller
            world, one size and fewer steps, of ``names`` a smaller world and fewer steps.
        seeds: Seeds of trainings and of what is drawn; ``quick`` takes the first.
        progress: Say what is done.
        alignment: Of ``filter``.
        saes: Of ``recover`` and ``multimodal``.
        photographs: Of ``multimodal``.
        naming: Of ``names``.

    Returns:
        The results, which are also in OUT/results.json.
    """
    if not seeds:
        raise InputError("seeds: at least 1 is needed, got 0")
    root, seeds = Path(out or f"runs/bench_{name}"), seeds[:1] if quick else seeds
    if name == "filter":
        from mmsae.bench.filter.run import FilterSizes, bench_filter

        return bench_filter(
            root, FilterSizes(), QUICK if quick else alignment.arms, seeds, alignment.damage, alignment.clip, progress
        )
    if name == "recover":
        from mmsae.bench.recover.run import bench_recover

        worlds = saes.worlds or (("independent", "hierarchical") if quick else ())
        steps = saes.sae_steps or (200 if quick else 800)
        return bench_recover(root, saes.variants, worlds, seeds, steps, progress)
    if name == "names":
        from mmsae.bench.names.run import NameSizes, bench_names

        tiny = {"train": 4000, "items": 2000, "clip_steps": 100, "sae_steps": 200} if quick else {}
        tiny |= {"sae_steps": saes.sae_steps} if saes.sae_steps else {}
        sizes = NameSizes(**tiny, threshold=naming.threshold)
        return bench_names(root, seeds, sizes, alignment.clip, progress)
    from mmsae.bench.multimodal.run import PairSizes, bench_multimodal

    shards = (photographs.train, photographs.test, photographs.host)
    if any(shards) and not all(shards):
        raise InputError("photographs need --train, --test and --host, all three")
    small = {"pairs": (4000, 1000), "clip_steps": 100, "steps": 200, "world": ((128, 8),)} if quick else {}
    size = PairSizes(**small | ({"steps": saes.sae_steps} if saes.sae_steps else {}))
    return bench_multimodal(root, size, saes.variants, seeds, shards if all(shards) else None, progress)
