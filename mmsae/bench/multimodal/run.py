"""``mmsae bench multimodal``: the table of SAEs over pairs, and which of them is the default for pairs."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmsae.bench.multimodal.data import Pairs, Photographs, World
from mmsae.bench.multimodal.report import write_multimodal_report
from mmsae.bench.sized import CONTROLS, PAIR, Size, fit, modalities_of, sae_recipes, scaled_terms
from mmsae.bench.stages import stages_of
from mmsae.bench.summary import over_seeds
from mmsae.demo.stages import SEEDS
from mmsae.errors import InputError
from mmsae.files import write_json
from mmsae.hosts import load_host
from mmsae.jobs.stages import Stages
from mmsae.metrics.pairs.pairs import pair_report
from mmsae.metrics.reconstruction import fvu
from mmsae.options import call
from mmsae.sae import SAE

LR, ROWS = 5e-3, 512
TUNING_SEED = 1000  #: Of the trainings by which strengths are chosen; no figure of theirs is reported.
#: Loss terms that tie the two codes of a pair.
COUPLING = ("CodeCosine", "EnergyMatch", "GroupSparse", "CrossReconstruction", "CodeInfoNCE", "MonoScore")
STRENGTHS = (0.1, 0.3, 1.0, 3.0)
CONTROLLED = "shared_topk"  #: The SAE whose controls are shown.


@dataclass(frozen=True)
class PairSizes:
    """How much of everything."""

    pairs: tuple[int, int] = (20_000, 3_000)  #: Generated pairs for training and choosing, and to be scored.
    clip_steps: int = 400  #: Steps of the CLIP that sees the generated world.
    steps: int = 800  #: Steps of each SAE.
    world: tuple[tuple[int, int], ...] = ((128, 8), (48, 6))  #: Latents and k on the generated world.
    photographs: tuple[tuple[int, int], ...] = ((48, 4), (256, 8))  #: Latents and k on photographs.


def bench_multimodal(
    root: Path,
    sizes: PairSizes = PairSizes(),
    names: Sequence[str] = (),
    seeds: Sequence[int] = (0, 1, 2),
    photographs: tuple[str, str, str] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """The benchmark at any size; a folder may be gone on with by more SAEs and more seeds.

    Args:
        root: Folder of everything.
        sizes: How much of everything.
        names: Recipes; none: all that are for pairs.
        seeds: Of the SAEs.
        photographs: Training shards, test shards and host; None: the generated world alone.
        progress: Whether to print what is done.

    Raises:
        InputError: A recipe that there is not, or that is not for pairs.
    """
    known = {name: path for name, path in sae_recipes().items() if len(modalities_of(path)) == 2}
    if odd := [name for name in names if name not in known]:
        raise InputError(f"variants: there is no {odd[0]} for pairs; there are {', '.join(known)}")
    recipe = {"bench": "multimodal", **{k: v for k, v in vars(sizes).items()}, "photographs": photographs}
    stages = stages_of(root, recipe | {"lr": LR, "rows": ROWS}, progress=False)
    results: dict[str, Any] = {}
    for source, data, shapes in _sources(stages, sizes, photographs, progress):
        for d_sae, k in shapes:
            place = f"{source}, F {d_sae}, k {k}"
            shape, chosen = (d_sae, k), {name: known[name] for name in names or known}
            results[place] = _table(stages, source, data, shape, chosen, seeds, sizes.steps, progress)
    found = {"seeds": list(seeds), "steps": sizes.steps, "tables": results}
    found["default"] = default_for_pairs(results)
    write_json(root / "results.json", found)
    return {**found, "out": str(write_multimodal_report(root, found))}


def _sources(
    stages: Stages, sizes: PairSizes, photographs: tuple[str, str, str] | None, progress: bool
) -> Iterator[tuple[str, Pairs, tuple[tuple[int, int], ...]]]:
    """Name, pairs and sizes of every source of data, the first made when it is asked for."""
    from mmsae.activations import extract
    from mmsae.world.generator.shards import write_world
    from mmsae.world.models.command import pretrain_clip

    root = stages.folder.out

    def world_clip() -> None:
        for split, n in zip(("train", "test"), sizes.pairs, strict=True):
            write_world(root / "shards" / split, n, SEEDS[split], split, progress=progress)
        shards = str(root / "shards" / "train")
        how = {"overwrite": True, "progress": progress}
        call(pretrain_clip, shards=shards, out=str(root / "clip"), steps=sizes.clip_steps, **how)

    stages.run("stages/clip", world_clip)
    host = load_host(f"local-dir:{root / 'clip'}")
    for split in ("train", "test"):
        extract(host, str(root / "shards" / split), root / "store" / split, progress=progress)
    yield "world", World(root / "store" / "train", root / "store" / "test", host, sizes.pairs), sizes.world
    if photographs is not None:
        yield "photographs", Photographs(*photographs, root / "photographs", progress), sizes.photographs


def _train(
    recipe: Path, data: Pairs, shape: tuple[int, int], steps: int, seed: int, strength: float, control: str = ""
) -> SAE:
    size = Size(data.train["image"].shape[1], *shape, PAIR, steps, ROWS)
    return fit(recipe, size, data.train, LR, seed, scale=COUPLING, strength=strength, control=control)


@torch.no_grad()
def _choice(sae: SAE, data: Pairs) -> dict[str, Any]:
    """What strengths and the default are chosen by, on rows that are not reported."""
    z = {m: sae.encode(x, m) for m, x in data.choose.items()}
    report = pair_report(z["image"], z["text"], same=data.same, ks=(1,))
    error = [fvu(sae.decode(c, m), data.choose[m]) for m, c in z.items()]
    return {
        "recall": report["recall_at_1"],
        "difference": report["code_cosine"]["difference"],
        "fvu": sum(error) / 2,
        "dead": report["dead_fraction"],
        "warnings": len(report["warnings"]),
        "l0": (report["l0"]["image"] + report["l0"]["text"]) / 2,
    }


def chosen_strength(tried: Mapping[float, Mapping[str, float]]) -> float:
    """The strength of the highest R@1 among those without a warning (among all, if all have one) whose FVU is at most
    1.25 times the lowest of these.
    """
    fair = {s: t for s, t in tried.items() if not t["warnings"]} or tried
    least = min(t["fvu"] for t in fair.values())
    return max((s for s in fair if fair[s]["fvu"] <= 1.25 * least), key=lambda s: fair[s]["recall"])


def _table(
    stages: Stages,
    source: str,
    data: Pairs,
    shape: tuple[int, int],
    recipes: Mapping[str, Path],
    seeds: Sequence[int],
    steps: int,
    progress: bool,
) -> dict[str, dict[str, float]]:
    """Figures of every SAE at one size, and of the controls of one of them."""
    start, rows, place = time.perf_counter(), {}, f"{source}-{shape[0]}-{shape[1]}"

    def done(name: str, runs: list[dict[str, float]]) -> None:
        rows[name] = over_seeds(runs)
        if progress:
            shown = ("recall", "fvu_image", "fvu_text", "shuffled", "dead")
            said = ", ".join(f"{figure} {rows[name][figure]:.3f}" for figure in shown)
            print(f"[{time.perf_counter() - start:.0f} s] {source} {shape}, {name}: {said}", flush=True)

    def runs(name: str, recipe: Path, strength: float, control: str = "") -> None:
        def once(seed: int) -> dict[str, float]:
            sae = _train(recipe, data, shape, steps, seed, strength, control)
            choice = {f"choice_{k}": v for k, v in _choice(sae, data).items()}
            return {**data.score(sae), **choice, "strength": strength}

        done(name, [stages.run(f"runs/{place}-{name}-{seed}", lambda s=seed: once(s)) for seed in seeds])

    for name, recipe in recipes.items():
        strength = 1.0
        if scaled_terms(recipe, COUPLING):

            def tried(strength: float, name: str = name, recipe: Path = recipe) -> dict[str, float]:
                return stages.run(
                    f"strengths/{place}-{name}-{strength:g}",
                    lambda: _choice(_train(recipe, data, shape, steps, TUNING_SEED, strength), data),
                )

            strength = chosen_strength({s: tried(s) for s in STRENGTHS})
        runs(name, recipe, strength)
    for control in CONTROLS:
        runs(f"{CONTROLLED} ({control})", sae_recipes()[CONTROLLED], 1.0, control)
    return rows


def default_for_pairs(tables: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict[str, Any]:
    """The SAE that reconstructs best among those whose codes pair well, on the rows to choose on of every table.

    In a table those pair well whose R@1 is at least .95 of the table's best and which give no warning in half of their
    runs or more. The default pairs well in the most tables; among equals the one of the lowest mean FVU, each in units
    of its table's lowest. No reported figure decides.
    """
    well: dict[str, list[float]] = {}
    for table in tables.values():
        rows = {name: row for name, row in table.items() if not name.endswith(")")}
        best = max(row["choice_recall"] for row in rows.values())
        fair = {
            name: row["choice_fvu"]
            for name, row in rows.items()
            if row["choice_recall"] >= 0.95 * best and row["choice_warnings"] < 0.5
        }
        for name, error in fair.items():
            well.setdefault(name, []).append(error / min(fair.values()))
    order = sorted(well, key=lambda n: (-len(well[n]), sum(well[n]) / len(well[n])))
    candidates = {n: {"tables": len(well[n]), "fvu": sum(well[n]) / len(well[n])} for n in order}
    return {"chosen": order[0] if order else None, "candidates": candidates}
