"""``mmsae bench multimodal``: the table of SAEs over pairs, and which of them is the default for pairs."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mmsae.bench.multimodal.conditions import NoisyWorld, PartialWorld, write_noisy
from mmsae.bench.multimodal.data import Pairs, Photographs, World
from mmsae.bench.multimodal.report import write_multimodal_report
from mmsae.bench.sized import CONTROLS, PAIR, Size, centres, fit, modalities_of, sae_recipes, scaled_terms
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
UNCENTRED = {"unit_in": True}  #: Normaliser of every SAE where inputs are not centred.
CENTRED = {
    "unit_in": True,
    "centre": True,
    "unit_out": True,
}  #: That of most recipes; the others get a second row with it.
FEW = ("sparc", "paired_topk", "jsae", "shared_topk", "mgsae", "vl_sae")  #: SAEs in the conditions of captions.
SAID = ("recall", "fvu_image", "fvu_text", "shuffled", "dead", "wrong_weighted", "wrong_host")


@dataclass(frozen=True)
class PairSizes:
    """How much of everything."""

    pairs: tuple[int, int] = (20_000, 3_000)  #: Generated pairs for training and choosing, and to be scored.
    clip_steps: int = 400  #: Steps of the CLIP that sees the generated world.
    steps: int = 800  #: Steps of each SAE.
    world: tuple[tuple[int, int], ...] = ((128, 8), (48, 6))  #: Latents and k on the generated world.
    photographs: tuple[tuple[int, int], ...] = ((48, 4),)  #: Latents and k on photographs.


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
    bench = Bench(stages, {name: known[name] for name in names or known}, seeds, sizes.steps, progress)
    tables: dict[str, Any] = {}
    conditions: dict[str, Any] = {}
    for place in _places(stages, sizes, photographs, progress):
        (tables if place.tuned_at is None else conditions)[place.name] = bench.table(place)
    found = {"seeds": list(seeds), "steps": sizes.steps, "tables": tables, "conditions": conditions}
    found["default"] = default_for_pairs(tables)
    write_json(root / "results.json", found)
    return {**found, "out": str(write_multimodal_report(root, found))}


class Place(NamedTuple):
    """What one table is of: pairs, and the SAEs' size."""

    source: str
    data: Pairs
    shape: tuple[int, int]  #: Latents and k.
    tuned_at: Place | None = None  #: Of a condition: the place whose strengths are taken.
    uncentred: bool = False  #: Whether inputs keep their modality's mean, and decoders have one bias.
    only: tuple[str, ...] = ()  #: The SAEs that are asked about; empty: all.

    @property
    def name(self) -> str:
        """Heading of the table."""
        return f"{self.source}, F {self.shape[0]}, k {self.shape[1]}"

    def stage(self, name: str) -> str:
        """The name of what is done here."""
        return f"{self.source}-{self.shape[0]}-{self.shape[1]}-{name}"


def _places(
    stages: Stages, sizes: PairSizes, photographs: tuple[str, str, str] | None, progress: bool
) -> Iterator[Place]:
    """Every place, its data made when it is asked for; conditions of the world are asked at its first size."""
    from mmsae.activations import extract
    from mmsae.world.generator.shards import write_world
    from mmsae.world.models.command import pretrain_clip

    root = stages.folder.out

    def clip(shards: Path, out: Path) -> None:
        how = {"overwrite": True, "progress": progress}
        call(pretrain_clip, shards=str(shards), out=str(out), steps=sizes.clip_steps, **how)

    def world_clip() -> None:
        for split, n in zip(("train", "test"), sizes.pairs, strict=True):
            write_world(root / "shards" / split, n, SEEDS[split], split, progress=progress)
        clip(root / "shards" / "train", root / "clip")

    def noisy_clip() -> None:
        write_noisy(noisy / "shards", sizes.pairs[0] * 4 // 5)
        clip(noisy / "shards", noisy / "clip")

    stages.run("stages/clip", world_clip)
    host = load_host(f"local-dir:{root / 'clip'}")
    for split in ("train", "test"):
        extract(host, str(root / "shards" / split), root / "store" / split, progress=progress)
    world = World(root / "store" / "train", root / "store" / "test", host, sizes.pairs)
    places = [Place("world", world, shape) for shape in sizes.world]
    yield from places
    at = {"shape": places[0].shape, "tuned_at": places[0]}
    yield Place("uncentred", world, **at, uncentred=True)
    yield Place("partial captions", PartialWorld(world, host), **at, only=FEW)
    noisy = root / "noisy"
    stages.run("stages/noisy_clip", noisy_clip)
    extract(f"local-dir:{noisy / 'clip'}", str(noisy / "shards"), noisy / "store", progress=progress)
    yield Place("noisy host", NoisyWorld(noisy / "store"), **at, only=FEW)
    if photographs is not None:
        seen = Photographs(*photographs, root / "photographs", progress)
        yield from (Place("photographs", seen, shape) for shape in sizes.photographs)


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


class Bench:
    """The SAEs of a benchmark, trained and scored wherever they are asked for; what is done is not done again.

    Args:
        stages: Where figures are kept.
        recipes: The SAEs.
        seeds: Of the trainings.
        steps: Steps of each.
        progress: Whether to print what is done.
    """

    def __init__(
        self, stages: Stages, recipes: Mapping[str, Path], seeds: Sequence[int], steps: int, progress: bool
    ) -> None:
        self.stages, self.recipes, self.seeds, self.steps, self.progress = stages, recipes, seeds, steps, progress

    def train(self, place: Place, recipe: Path, seed: int, strength: float = 1.0, change: str = "") -> SAE:
        """One SAE; ``change`` is a control, ``centred`` for other inputs than the recipe's, or empty."""
        x = place.data.train
        size = Size(x["image"].shape[1], *place.shape, PAIR, self.steps, ROWS)
        how = {"normaliser": UNCENTRED, "one_bias": True} if place.uncentred else {}
        how |= {"normaliser": CENTRED} if change == "centred" else {"control": change}
        return fit(recipe, size, x, LR, seed, scale=COUPLING, strength=strength, **how)

    def strength(self, place: Place, name: str) -> float:
        """The strength of a recipe's coupling, chosen here or at the place where a condition takes it from."""
        place, recipe = place.tuned_at or place, self.recipes[name]
        if not scaled_terms(recipe, COUPLING):
            return 1.0

        def tried(strength: float) -> dict[str, float]:
            work = lambda: _choice(self.train(place, recipe, TUNING_SEED, strength), place.data)  # noqa: E731
            return self.stages.run(f"strengths/{place.stage(name)}-{strength:g}", work)

        return chosen_strength({s: tried(s) for s in STRENGTHS})

    def table(self, place: Place) -> dict[str, dict[str, float]]:
        """Figures of every SAE; where the place is no condition of another, also of the controls of one of them, and of
        those that do not centre with centred inputs.
        """
        asked = [(name, "") for name in self.recipes if not place.only or name in place.only]
        if place.tuned_at is None:
            asked += [(name, "centred") for name, recipe in self.recipes.items() if not centres(recipe)]
            asked += [(CONTROLLED, control) for control in CONTROLS]
        start, rows = time.perf_counter(), {}
        for name, change in asked:
            label = f"{name} ({change})" if change else name
            rows[label] = row = self._row(place, name, change, label)
            if self.progress:
                said = ", ".join(f"{figure} {row[figure]:.3f}" for figure in SAID if figure in row)
                print(f"[{time.perf_counter() - start:.0f} s] {place.name}, {label}: {said}", flush=True)
        return rows

    def _row(self, place: Place, name: str, change: str, label: str) -> dict[str, float]:
        recipe = sae_recipes()[name]
        strength = 1.0 if change in CONTROLS else self.strength(place, name)

        def once(seed: int) -> dict[str, float]:
            sae = self.train(place, recipe, seed, strength, change)
            choice = {f"choice_{k}": v for k, v in _choice(sae, place.data).items()}
            return {**place.data.score(sae), **choice, "strength": strength}

        runs = [self.stages.run(f"runs/{place.stage(label)}-{seed}", lambda s=seed: once(s)) for seed in self.seeds]
        return over_seeds(runs) | place.data.host


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
