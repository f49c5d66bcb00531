"""``mmsae sweep``: the same recipe at several k and sizes, and the curve of unexplained variance over L0."""

from __future__ import annotations

import csv
import shlex
import time
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from mmsae.errors import InputError
from mmsae.files import atomic_file
from mmsae.jobs.stages import Stages
from mmsae.recipes import find_recipe, read_recipe

Row = dict[str, Any]
RUNS = "k*-ratio*-seed*"


class SweepPoint(NamedTuple):
    """One training."""

    k: int  #: Latents kept a row.
    ratio: float  #: Latents per input feature.
    seed: int  #: Seed of weights and order.

    @property
    def folder(self) -> str:
        """Name of its run folder."""
        return f"k{self.k}-ratio{self.ratio:g}-seed{self.seed}"


def sweep(
    store: str,
    out: str = "runs/sweep",
    recipe: str = "configs/train/paired_topk_store.yaml",
    k: list[int] = [8, 16, 32],  # noqa: B006, read only
    ratio: list[float] = [4.0, 8.0],  # noqa: B006
    seeds: list[int] = [0],  # noqa: B006
    steps: int | None = None,
    fit_options: str = "",
) -> str:
    """Train a recipe at every combination of k, ratio and seed, and draw FVU over L0.

    Each point is an ``mmsae fit`` of its own in ``OUT/k8-ratio4-seed0`` and so on. The same command goes on where it
    was stopped; points may be added by calling it again with more values.

    Args:
        store: Activations that ``mmsae extract`` wrote.
        out: Folder for the runs, ``sweep.json``, ``sweep.csv`` and ``sweep.png``.
        recipe: Recipe for a store, whose selector has a k.
        k: Latents kept a row, several values.
        ratio: Latents per input feature, several values.
        seeds: Seeds, several values; the curve is their mean.
        steps: Steps of each training; by default the recipe's.
        fit_options: More options of ``mmsae fit``, in one string, as "--data.batch_size 256 --trainer.accelerator gpu".

    Returns:
        Paths of the table and the picture.

    Raises:
        InputError: The folder holds another sweep, or the recipe has no validation or no length.
    """
    from mmsae.jobs.estimate import duration
    from mmsae.jobs.folder import JobFolder

    root, points = Path(out), [SweepPoint(*p) for p in product(k, ratio, seeds)]
    plan = _plan(store, recipe, steps, fit_options)
    if not any(root.glob(RUNS)):  # nothing was trained: the folder is free for another sweep
        (root / "sweep.json").unlink(missing_ok=True)
    folder = JobFolder(root, plan, "mmsae sweep", writes=(), but=("points",), file="sweep.json", holds="a sweep")
    if not folder.file.exists():
        folder.note(points=[])
    trained = Stages(folder, "/sae/cfg.json")  # mmsae fit writes it, when it has ended
    todo = [p for p in points if not trained.done(p.folder)]
    print(
        f"{len(points)} trainings of {plan['steps']} steps in {root}"
        + f", {len(points) - len(todo)} of them done before"
    )
    start = time.monotonic()
    for i, point in enumerate(todo):
        print(f"[{i + 1}/{len(todo)}] k {point.k}, ratio {point.ratio:g}, seed {point.seed}", flush=True)
        try:
            _train(point, root / point.folder, plan)
        except InputError:
            folder.discard()
            raise
        left = (time.monotonic() - start) / (i + 1) * (len(todo) - i - 1)
        print(f"about {duration(left)} left" if left else "all done", flush=True)
    rows = [_row(root / run, trained.read(run)) for run in sorted(trained.all_done(RUNS), key=_point)]
    folder.note(points=rows)
    _write(root, rows)
    return f"{root / 'sweep.csv'}\n{root / 'sweep.png'}"


def _plan(store: str, recipe: str, steps: int | None, fit_options: str) -> Row:
    """What all points have in common; kept in ``sweep.json``, so that a folder never mixes two sweeps."""
    path = find_recipe(recipe)
    if steps is None:
        steps = (read_recipe(path).get("trainer") or {}).get("max_steps")
        if not steps:
            raise InputError(f"{recipe} has no trainer.max_steps: give --steps")
    return {"recipe": recipe, "store": store, "steps": steps, "fit_options": fit_options}


def lightning(args: list[str]) -> None:
    """``mmsae fit``, whose libraries the help does not need."""
    from mmsae.training.cli import run

    run(args)


def _train(point: SweepPoint, run: Path, plan: Mapping[str, Any]) -> None:
    args = ["fit", "-c", plan["recipe"], "--data.store", plan["store"], "--trainer.default_root_dir", str(run)]
    args += ["--model.sae.init_args.selector.init_args.k", str(point.k), "--model.sae.init_args.d_sae", "null"]
    args += ["--model.sae.init_args.ratio", str(point.ratio), "--seed_everything", str(point.seed)]
    args += ["--trainer.max_steps", str(plan["steps"]), "--trainer.devices", "1"]
    # one validation, at the last step
    args += ["--trainer.val_check_interval", str(plan["steps"]), "--trainer.check_val_every_n_epoch", "null"]
    args += ["--ckpt_path", "last"]
    lightning(args + shlex.split(plan["fit_options"]))


def _point(run: str) -> SweepPoint:
    k, ratio, seed = run.split("-", 2)
    return SweepPoint(int(k[1:]), float(ratio.removeprefix("ratio")), int(seed.removeprefix("seed")))


def _row(run: Path, cfg: Row) -> Row:
    """Figures of one finished point: the last validation's, from the configuration of its SAE."""
    point, block = _point(run.name), cfg["mmsae"]
    values = {name.removeprefix("val/"): v for name, v in block["training"]["validation"].items()}
    if not values:
        raise InputError(f"{run} has no validation figures: the recipe's data needs a val_fraction above 0")
    return {**point._asdict(), "d_sae": block["d_sae"], "steps": block["training"]["steps"], **values, "run": run.name}


def _write(root: Path, rows: list[Row]) -> None:
    with atomic_file(root / "sweep.csv") as temp, temp.open("w", newline="") as f:
        writer = csv.DictWriter(f, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)
    with atomic_file(root / "sweep.png") as temp:
        draw(rows, temp)


def draw(rows: list[Row], path: Path) -> None:
    """The picture: FVU over L0 above, share of latents that never fire on the validation data below.

    Args:
        rows: Points as in ``sweep.json``; points that differ in their seed are averaged, whiskers go from the least to
            the largest value.
        path: PNG file.
    """
    from matplotlib.figure import Figure

    from mmsae.metrics.statistics import whiskers

    modalities = [name.removeprefix("fvu/") for name in rows[0] if name.startswith("fvu/") and name != "fvu/joint"]
    fig = Figure(figsize=(4.2 * len(modalities) + 0.6, 5.4), layout="constrained")
    axes = fig.subplots(2, len(modalities), sharex=True, sharey="row", squeeze=False, height_ratios=(2, 1))
    for column, m in zip(axes.T, modalities, strict=True):
        for ratio in sorted({row["ratio"] for row in rows}):
            curve = [row for row in rows if row["ratio"] == ratio]
            label = f"ratio {ratio:g} ({curve[0]['d_sae']} latents)"
            groups = [[r for r in curve if r["k"] == k] for k in sorted({r["k"] for r in curve})]
            l0 = [_mean(g, f"l0/{m}") for g in groups]
            for ax, name in zip(column, (f"fvu/{m}", f"dead/{m}"), strict=True):
                middle = [_mean(g, name) for g in groups]
                values = [[r[name] for r in g] for g in groups]
                ends = [whiskers(y, min(v), max(v)) for y, v in zip(middle, values, strict=True)]
                ax.errorbar(l0, middle, list(zip(*ends, strict=True)), marker="o", ms=4, capsize=2, label=label)
        column[0].set_title(m)
        column[1].set_xlabel("L0 (latents that fire per row)")
        column[1].set_xscale("log", base=2)
        column[1].xaxis.set_major_formatter("{x:g}")
    axes[0, 0].set_ylabel("FVU (share of variance unexplained)")
    axes[1, 0].set_ylabel("share of latents dead")
    axes[0, -1].legend(frameon=False)
    for ax in axes.flat:
        ax.grid(alpha=0.3)
        ax.set_ylim(0, 1.05 * max(ax.dataLim.y1, 0.1))
    fig.savefig(path, dpi=150, format="png")


def _mean(rows: list[Row], name: str) -> float:
    return sum(row[name] for row in rows) / len(rows)
