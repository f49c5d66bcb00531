"""``mmsae sweep``: the same recipe at several k, sizes and sites, and the curve of unexplained variance over L0."""

from __future__ import annotations

import csv
import json
import shlex
import shutil
import time
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from mmsae.errors import InputError
from mmsae.files import atomic_file
from mmsae.jobs.stages import Stages
from mmsae.options import at_least
from mmsae.recipes import find_recipe, read_recipe
from mmsae.training.members.sites import site_word
from mmsae.training.members.table import TABLES, draw, figures, of_stopped, sites_of

Row = dict[str, Any]
RUNS = "k*-ratio*-seed*"


class SweepPoint(NamedTuple):
    """One training."""

    k: int  #: Latents kept a row.
    ratio: float  #: Latents per input feature.
    seed: int  #: Seed of weights and order.
    sites: str = ""  #: Where its activations were read; empty: at the recipe's sites.

    @property
    def folder(self) -> str:
        """Name of its run folder."""
        name = f"k{self.k}-ratio{self.ratio:g}-seed{self.seed}"
        return f"{name}-{site_word(self.sites)}" if self.sites else name


def sweep(
    store: str,
    out: str = "runs/sweep",
    recipe: str = "configs/train/paired_topk_store.yaml",
    k: list[int] = [8, 16, 32],  # noqa: B006, read only
    ratio: list[float] = [4.0, 8.0],  # noqa: B006
    seeds: list[int] = [0],  # noqa: B006
    sites: list[str] = [],  # noqa: B006
    steps: int | None = None,
    fit_options: str = "",
    at_once: int | None = None,
) -> str:
    """Train a recipe at every combination of k, ratio, seed and site, and draw FVU over L0.

    All points are trained on the same batches in one pass over the store, each to what an ``mmsae fit`` of its own
    would make of it, in ``OUT/k8-ratio4-seed0`` and so on. The same command goes on where it was stopped; points may be
    added by calling it again with more values, and are a pass of their own.

    Args:
        store: Activations that ``mmsae extract`` wrote.
        out: Folder for the runs, ``sweep.json``, ``sweep.csv`` and ``sweep.png``.
        recipe: Recipe for a store, whose selector has a k.
        k: Latents kept a row, several values.
        ratio: Latents per input feature, several values.
        seeds: Seeds, several values; the curve is their mean.
        sites: Sites of the store, several values, for a recipe of one modality. Default: those of the recipe.
        steps: Steps of each training; by default the recipe's.
        fit_options: More options of ``mmsae fit``, in one string, as "--data.batch_size 256 --trainer.accelerator gpu".
        at_once: SAEs trained in one pass, where all together do not fit into memory. Default: all.

    Returns:
        Paths of the table and the picture.

    Raises:
        InputError: The folder holds another sweep, the recipe has no validation or no length, or a point diverged; then
            the table has the others, why that one stopped, and the step after which it is kept (``sae-last-good``).
    """
    from mmsae.files import duration
    from mmsae.jobs.folder import JobFolder

    at_least(1, at_once=at_once)

    root, points = Path(out), [SweepPoint(*p) for p in product(k, ratio, seeds, sites or [""])]
    plan = _plan(store, recipe, steps, fit_options)
    last = root / "checkpoints" / "last.ckpt"
    if not any(root.glob(RUNS)) and not last.exists():  # nothing was trained: the folder is free for another sweep
        (root / "sweep.json").unlink(missing_ok=True)
    folder = JobFolder(
        root, plan, "mmsae sweep", writes=(), but=("points", "under_way"), file="sweep.json", holds="a sweep"
    )
    if not folder.file.exists():
        folder.note(points=[], under_way={})
    trained = Stages(folder, "/sae/cfg.json")  # mmsae fit writes it, when it has ended
    begun = folder.noted().get("under_way", {}) if last.exists() else {}
    todo = [p for p in points if p.folder not in begun and not trained.done(p.folder)]
    asked = begun if isinstance(begun, dict) else dict.fromkeys(begun, "")  # names alone, of earlier versions
    under_way = [_point(name)._replace(sites=at) for name, at in asked.items()]
    passes = [under_way] * bool(begun) + list(_chunks(todo, at_once or len(todo) or 1))
    n = sum(map(len, passes))
    print(f"{len(points)} trainings of {plan['steps']} steps in {root}, {n} to do in {len(passes)} passes", flush=True)
    start, done, diverged = time.monotonic(), 0, []
    stopped = {row["run"]: row for row in folder.noted()["points"] if "stopped" in row}
    for some in passes:
        folder.note(points=folder.noted()["points"], under_way={p.folder: p.sites for p in some})
        try:
            _train(some, root, plan)
        except InputError as e:
            whys = _diverged(e)
            if not whys:
                if not any(trained.done(p.folder) for p in points):
                    folder.discard()
                raise
            diverged.append(e)
            stopped |= {run: _row_of_stopped(run, why, e.good.get(run)) for run, why in whys.items()}
        shutil.rmtree(last.parent, ignore_errors=True)
        for name in TABLES:
            (root / name).unlink(missing_ok=True)  # of one pass; the sweep's own are of all
        runs = trained.all_done(RUNS)
        found = {run: _row(root / run) for run in runs} | {n: row for n, row in stopped.items() if n not in runs}
        rows = [found[run] for run in sorted(found, key=_point)]
        folder.note(points=rows, under_way={})
        _write(root, rows)
        done += len(some)
        left = (time.monotonic() - start) / done * (n - done)
        print(f"{done} of {n} done" + (f", about {duration(left)} left" if left else ""), flush=True)
    if diverged:
        raise InputError("; ".join(map(str, diverged)))
    return f"{root / 'sweep.csv'}\n{root / 'sweep.png'}"


def _diverged(error: InputError) -> Mapping[str, str]:
    """``{run: why}`` of members of a pass that have no result, where other passes may have theirs."""
    from mmsae.training.lit import NotFinite  # the training has imported it

    return error.stopped if isinstance(error, NotFinite) else {}


def _chunks(points: list[SweepPoint], size: int) -> Iterator[list[SweepPoint]]:
    yield from (points[i : i + size] for i in range(0, len(points), size))


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


def _train(points: list[SweepPoint], root: Path, plan: Mapping[str, Any]) -> None:
    members = {p.folder: {name: v for name, v in p._asdict().items() if v != ""} for p in points}
    args = ["fit", "-c", plan["recipe"], "--data.store", plan["store"], "--trainer.default_root_dir", str(root)]
    args += ["--members", json.dumps(members), "--trainer.max_steps", str(plan["steps"]), "--trainer.devices", "1"]
    # one validation, at the last step
    args += ["--trainer.val_check_interval", str(plan["steps"]), "--trainer.check_val_every_n_epoch", "null"]
    args += ["--ckpt_path", "last"]
    lightning(args + shlex.split(plan["fit_options"]))


def _point(run: str) -> SweepPoint:
    k, ratio, seed, *site = run.split("-", 3)
    return SweepPoint(int(k[1:]), float(ratio.removeprefix("ratio")), int(seed.removeprefix("seed")), *site)


def _row_of_stopped(run: str, why: str, good: int | None) -> Row:
    own = {name: v for name, v in _point(run)._asdict().items() if v != ""}
    return {**own, "run": run, **of_stopped(why, good)}


def _row(run: Path) -> Row:
    """Figures of one finished point: the last validation's, from the configuration of its SAE."""
    found = figures(run)
    if not any("/" in name for name in found):
        raise InputError(f"{run} has no validation figures: the recipe's data needs a val_fraction above 0")
    point = _point(run.name)
    own = point._asdict() | ({"sites": sites_of(run)} if point.sites else {})
    return {**{name: v for name, v in own.items() if v != ""}, **found, "run": run.name}


def _write(root: Path, rows: list[Row]) -> None:
    with atomic_file(root / "sweep.csv") as temp, temp.open("w", newline="") as f:
        writer = csv.DictWriter(f, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)
    drawn = []
    trained = (row for row in rows if "stopped" not in row)
    for row in sorted(trained, key=lambda row: (row.get("sites", ""), row["ratio"], row["k"])):
        curve = f"ratio {row['ratio']:g} ({row['d_sae']} latents)"
        drawn.append(row | {"curve": f"{row['sites']}, {curve}" if "sites" in row else curve, "point": row["k"]})
    if drawn:
        with atomic_file(root / "sweep.png") as temp:
            draw(drawn, temp)
