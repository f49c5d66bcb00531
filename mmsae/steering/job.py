"""The job of ``mmsae steer``: what is drawn, batch by batch, and the tables and figures that are written about it."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors.torch import load_file, save_file

from mmsae.files import atomic_file, disk_errors, write_json
from mmsae.hosts import pick_device
from mmsae.jobs.estimate import duration, progress_bar
from mmsae.jobs.folder import JobFolder
from mmsae.metrics.concepts.names import read_names
from mmsae.options import Drawing, OneProcessRun, at_least
from mmsae.report.figures import write_png
from mmsae.sae.fingerprint import sae_fingerprint
from mmsae.steering.edits.units import FeatureStats
from mmsae.steering.measure.controls import controls
from mmsae.steering.measure.plots import before_after, dose_plot
from mmsae.steering.measure.sweep import (
    STRIDE,
    Condition,
    Images,
    Item,
    check,
    collect,
    doses,
    noise,
    run_batch,
    summary,
    verdicts,
)
from mmsae.steering.options import Edits, Gates, Sweep
from mmsae.steering.recipe import (
    features_of,
    load_site,
    make_metrics,
    make_steering,
    method_of,
    read_mask,
    read_prompts,
)
from mmsae.types import InputError

SHOWN_CONTROLS = 2
STATS = ("stats", "concept_stats.safetensors")
WRITES = ["parts", "stats", "table.parquet", "table.csv", "results.json", "report.html"]


class SteeringJob:
    """A sweep of one intervention in a folder; the arguments are those of :func:`~mmsae.steering.command.steer`.

    Raises:
        InputError: Options that do not go together, or a folder that holds another run.
    """

    def __init__(
        self,
        host: str,
        sae: str,
        prompts: Sequence[str],
        out: Path,
        edits: Edits,
        gates: Gates,
        sweep: Sweep,
        drawing: Drawing,
        run: OneProcessRun,
    ) -> None:
        self.edits, self.gates, self.sweep, self.progress = edits, gates, sweep, run.progress
        self.method, self.size, self.steps = method_of(edits), run.batch_size, drawing.steps
        window, device = gates.window, pick_device(run.device)
        if len(window) not in (0, 2) or (window and not 0 <= window[0] < window[1] <= drawing.steps):
            raise InputError(f"window {list(window)} is not the first and one after the last of {drawing.steps} steps.")
        at_least(1, steps=drawing.steps, batch_size=run.batch_size, top=edits.top)
        at_least(0, controls=sweep.controls)
        self.texts, mask = read_prompts(prompts), read_mask(gates.mask)
        self.metrics = make_metrics(sweep, edits.words, mask, device)
        options = {k: v for k, v in asdict(drawing).items() if v is not None}
        self.at = load_site(host, sae, gates.site, device, run, options)
        self.names = read_names(sweep.names, sae_fingerprint(self.at.sae))
        self.acting = {
            "unit": gates.unit, "writeback": gates.writeback, "policy": gates.policy, "branch": gates.branch,
            "tokens": gates.tokens, "steps": tuple(window) or None, "active": gates.active, "space": mask,
        }  # fmt: skip
        if self.method == "forget" and max(sweep.strengths) >= 0:
            raise InputError(
                f"forget multiplies codes by negative factors: strengths {list(sweep.strengths)} have others."
            )
        self.batches = check(self.texts, sweep.seeds, doses("x", sweep.strengths, lambda s: {}), run.batch_size)
        # concept vectors have no atoms of single features, so no random ones either
        self.n_controls = 0 if self.method == "concept" else sweep.controls
        job = {
            "host": self.at.host.fingerprint, "sae": sae_fingerprint(self.at.sae), "site": str(self.at.site),
            "prompts": self.texts, "how": asdict(edits), "strengths": sweep.strengths, "seeds": sweep.seeds,
            "stride": STRIDE, "controls": sweep.controls, "batch_size": run.batch_size, "options": options,
            "gates": {**self.acting, "space": None if mask is None else mask.tolist()},
            "shown": sweep.shown, "metrics": [*sweep.scorers, sweep.judge, sweep.target], "stats": gates.stats,
        }  # fmt: skip
        self.files = JobFolder(out, job, "mmsae steer", writes=WRITES)
        self.folder = out

    def run(self) -> dict[str, Any]:
        """Draw what is missing and write tables and figures; returns what ``results.json`` has.

        Raises:
            InputError: What was asked for cannot be done; then a run that had drawn nothing leaves nothing.
        """
        with self.files.lead(), disk_errors(self.folder):
            try:
                name, conditions = self._conditions()
                table, kept = self._draw(conditions)
            except InputError:
                self.files.discard(STATS)
                raise
            return self._write(name, table, kept)

    def _conditions(self) -> tuple[str, list[Condition]]:
        """The name of the intervention, and what is compared: every strength, and its random controls."""
        n = len(self.sweep.strengths) * (1 + self.n_controls) + 1
        if self.progress:
            print(
                f"{len(self.texts)} prompts, {len(self.sweep.seeds)} seeds: {n * len(self.batches)} generations of up "
                f"to {self.size} images in {self.steps} steps, {len(self.batches)} without steering and "
                f"{len(self.batches) * len(self.sweep.strengths)} with; at {self.at.site.module}"
            )
        seed = noise(self.sweep.seeds[0], len(self.texts))  # that of no image that is reported
        stats = self._stats(seed)
        name, steering = make_steering(self.edits, self.at, self.acting, stats, self.folder, seed, self.progress)
        found = doses(name, self.sweep.strengths, steering)
        return name, found + (controls(found, self.n_controls, stats.live()) if self.n_controls else [])

    def _stats(self, seed: int) -> FeatureStats:
        path = Path(self.gates.stats or self.folder / "stats")
        if self.gates.stats or path.exists():
            return FeatureStats.load(path)
        anchors = self.edits.anchors if self.method == "words" else None
        return self.at.stats(self.texts if anchors is None else read_prompts(anchors), seed).save(path)

    def _draw(self, conditions: Sequence[Condition]) -> tuple[pd.DataFrame, Images]:
        """The table and the images to show, batch by batch; finished batches are read."""
        items = [Item(p, noise(self.sweep.seeds[0], i)) for i, p in enumerate(self.texts[: self.sweep.shown])]
        tables, images, start, drawn = [], {}, time.monotonic(), 0
        parts, each = self.folder / "parts", len(conditions) + 1
        parts.mkdir(exist_ok=True)
        bar = progress_bar("steering", "generation", self.progress, len(self.batches) * each)
        with warnings.catch_warnings(), bar:
            warnings.filterwarnings("once", message=".*may break")
            for i, batch in enumerate(self.batches):
                file, shown = parts / f"{i:05d}.parquet", parts / f"{i:05d}.safetensors"
                if file.exists():
                    bar.update(each)
                else:
                    own: Images = {}
                    watch = collect(items, own)
                    rows = run_batch(
                        self.at.host, batch, conditions, self.metrics, watch, bar.update, **self.at.options
                    )
                    _save_images(own, shown)
                    with atomic_file(file) as temp:
                        rows.to_parquet(temp)
                    drawn += 1
                    left = (time.monotonic() - start) / drawn * (len(self.batches) - i - 1)
                    if self.progress and drawn == 1 and left > 30:
                        bar.write(f"about {duration(left)} left")
                tables.append(pd.read_parquet(file))
                for key, found in _load_images(shown).items():
                    images.setdefault(key, {}).update(found)
        return pd.concat(tables, ignore_index=True), images

    def _write(self, name: str, table: pd.DataFrame, kept: Images) -> dict[str, Any]:
        metrics, means = ["moved", *self.metrics], summary(table)
        results = {
            "job": self.files.job,
            "name": name,
            "summary": _records(means),
            "verdicts": {m: _records(verdicts(table, m)) for m in metrics},
        }
        if own := {j: self.names[j] for j in features_of(self.edits) if j in self.names}:
            results["features"] = {str(j): name.to_dict() for j, name in own.items()}
        for suffix, write in (("parquet", table.to_parquet), ("csv", lambda path: table.to_csv(path, index=False))):
            with atomic_file(self.folder / f"table.{suffix}") as temp:
                write(temp)
        if kept:
            write_png(before_after(kept, name), self.folder / "before_after.png")
        write_png(dose_plot(table, metrics, name), self.folder / "dose.png")
        write_json(self.folder / "results.json", results)
        if self.progress:
            print(means[~means.control].drop(columns="control").to_string(index=False, float_format="%.3f"))
        return results


def _save_images(kept: Images, path: Path) -> None:
    flat = {
        json.dumps([*key, *item]): (image.clamp(0, 1) * 255).round().byte().contiguous()
        for key, own in kept.items()
        if key[2] < SHOWN_CONTROLS
        for item, image in own.items()
    }
    with atomic_file(path) as temp:
        save_file(flat or {"none": torch.zeros(0)}, temp)


def _load_images(path: Path) -> Images:
    out: Images = {}
    for key, image in load_file(path).items():
        if key != "none":
            name, strength, control, prompt, seed = json.loads(key)
            out.setdefault((name, strength, control), {})[Item(prompt, seed)] = image.float() / 255
    return out


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as plain values; what is undefined is null."""
    return json.loads(frame.to_json(orient="records"))
