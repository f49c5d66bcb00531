"""``mmsae steer``: draw prompts with and without an intervention at several strengths, and measure what changed."""

from __future__ import annotations

import base64
import json
import math
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from markupsafe import Markup, escape
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from mmsae.files import atomic_file, disk_errors
from mmsae.hosts import pick_device
from mmsae.lvlm.hallucination.answers import same_job
from mmsae.report.figures import Figure, write_png
from mmsae.report.page import Fact, Section, Table, render_report
from mmsae.sae.fingerprint import sae_fingerprint
from mmsae.steering.edits.units import FeatureStats
from mmsae.steering.measure.controls import CONTROLS, controls
from mmsae.steering.measure.plots import before_after, dose_plot
from mmsae.steering.measure.scorers import Metric
from mmsae.steering.measure.sweep import STRIDE, Arm, Item, check, collect, doses, noise, run_batch, summary, verdicts
from mmsae.steering.recipe import Asked, at_least, load_target, make_metrics, make_way, plain, read_mask, read_prompts
from mmsae.types import InputError

if TYPE_CHECKING:
    import pandas as pd


SHOWN_CONTROLS = 2
WRITTEN = ["parts", "stats", *(f"table.{e}" for e in ("parquet", "csv")), "results.json", "report.html"]


class Result(NamedTuple):
    """What a run wrote, for its report.

    Attributes:
        folder: Of the run.
        name: Of the intervention.
        table: Tidy table, see :mod:`mmsae.steering.measure.sweep`.
        metrics: Names of the metrics.
        kept: Pictures that are shown.
        results: What ``results.json`` has.
    """

    folder: Path
    name: str
    table: pd.DataFrame
    metrics: list[str]
    kept: dict[tuple[str, float, int], dict[Item, Tensor]]
    results: dict[str, Any]


def steer(
    host: str,
    sae: str,
    prompts: list[str],
    out: str = "runs/steer",
    features: list[int] = [],  # noqa: B006  jsonargparse shows it in the help; it is not changed
    op: str = "add",
    edit: list[dict[str, Any]] = [],  # noqa: B006
    concept: str | None = None,
    words: list[str] = [],  # noqa: B006
    forget: str | None = None,
    anchors: Any = None,
    top: int = 16,
    percentile: float = 99.995,
    strengths: list[float] = [1.0, 2.0, 5.0],  # noqa: B006
    unit: str = "x_mean_active",
    writeback: str = "delta",
    policy: str = "post",
    site: str | None = None,
    allow_other_site: bool = False,
    branch: str = "cond",
    tokens: str | None = None,
    window: list[int] = [],  # noqa: B006
    active: float | None = None,
    mask: str | None = None,
    stats: str | None = None,
    seeds: list[int] = [0, 1, 2],  # noqa: B006
    controls: int = CONTROLS,
    steps: int = 20,
    guidance: float = 3.0,
    negative: str | None = None,
    scorers: list[str] = [],  # noqa: B006
    judge: str | None = None,
    target: str | None = None,
    batch_size: int = 8,
    shown: int = 6,
    device: str = "auto",
    precision: str = "fp32",
    progress: bool = True,
    present: Callable[[Result], None] | None = None,
) -> Path:
    """Steer a diffusion model with SAE features, over prompts, seeds and strengths, beside random features.

    Say how to steer by one of ``features``, ``edit``, ``concept``, ``words`` and ``forget``. The same prompts and noise
    are drawn without steering, at every strength, and with random live features at equal size of change. A killed run
    goes on where it stopped.

    Args:
        host: Diffusion pipeline, ``diffusers:FOLDER`` or ``diffusers:HUB_ID``.
        sae: SAE folder or hub id.
        prompts: Prompts, or text files (.txt) with one a line.
        out: Folder for the pictures, ``table.parquet``, ``table.csv``, ``results.json`` and ``report.html``.
        features: Latents to edit.
        op: What is done to them: add, set or scale, by the strength.
        edit: Instead of features: primitives of one edit, as ``{op: set, ids: [3], v: 1} {op: ablate, ids: [5]}``.
        concept: Instead: a phrase, whose concept vector is added, strength times (negative removes).
        words: Instead: two words; the second takes the place of the first in the text encoder's codes.
        forget: Instead: a concept that the denoiser shall not draw any more; strengths are then the negative factors.
        anchors: Prompts that choose features, which should be others than ``prompts``: for words a text file, for
            forget a YAML file of {concept: [prompts]}.
        top: Features exchanged for words.
        percentile: Of selection scores, for forget.
        strengths: Several values; none is 0, which is always drawn.
        unit: Of strengths: raw, x_mean_active, x_mean_all, x_max, x_p99 (...), rel_norm.
        writeback: How the host's state is changed: delta, splice, direction or project_out.
        policy: Of top-k SAEs: post, pre or budget.
        site: Where, as ``unet.mid_block.attentions.0:update``; default: where the SAE was trained.
        allow_other_site: Accept an SAE of another host or module (never of another signal or width).
        branch: Guidance branches: cond, uncond, all or sign (+ and -).
        tokens: Tokens of text sites: content, eos, pad or all; default content.
        window: Steps at which to act, first and one after the last; default all.
        active: Act only on tokens where a feature exceeds this raw code.
        mask: Grey picture, white where to act; then the share of the change inside is measured too.
        stats: Folder of feature statistics; default: they are measured on the anchors, or the prompts.
        seeds: Of the noise of the first prompt, several values; prompt i, from 0, has each plus 1000003 i, so that
            no two prompts share their noise. The table has the sums.
        controls: Random live features to compare with, at every strength; 0 for none.
        steps: Of the scheduler.
        guidance: Guidance scale.
        negative: Text to guide away from.
        scorers: Scores of pictures, ``NAME=MODULE:SCORER`` or ``NAME=MODULE:MAKE(ARGUMENTS)``: a scorer takes pictures
            ``(B, 3, H, W)`` in [0, 1] and their prompts and returns B numbers.
        judge: open_clip host that measures how far pictures move towards ``target`` and what is kept of them.
        target: Text that should become true; with words, the prompt with the second word.
        batch_size: Pictures at a time.
        shown: Prompts in the grid of pictures, with the first seed.
        device: cpu, cuda or auto.
        precision: fp32, bf16 or fp16.
        progress: Whether to show bars and print.
        present: Called with the result when everything is measured.

    Returns:
        The folder.

    Raises:
        InputError: Options that do not go together, or a folder that holds another run.
    """
    asked = Asked(features, op, edit, concept, words, anchors, top, forget, percentile)
    method, folder = asked.method, Path(out)
    device = pick_device(device)
    if len(window) not in (0, 2) or (window and not 0 <= window[0] < window[1] <= steps):
        raise InputError(f"window {window} is not the first and one after the last of {steps} steps.")
    at_least(1, steps=steps, batch_size=batch_size, top=top)
    at_least(0, controls=controls)
    texts, weights = read_prompts(prompts), read_mask(mask)
    metrics = make_metrics(scorers, judge, target, words, weights, device)
    options = {"steps": steps, "guidance": guidance} | ({} if negative is None else {"negative": negative})
    to = load_target(host, sae, site, device, precision, allow_other_site, options)
    gates = {"unit": unit, "writeback": writeback, "policy": policy, "branch": branch, "tokens": tokens,
             "steps": tuple(window) or None, "active": active, "space": weights}  # fmt: skip
    if method == "forget" and max(strengths) >= 0:
        raise InputError(f"forget multiplies codes by negative factors: strengths {strengths} have others.")
    plan = doses("x", strengths, lambda s: {})
    batches = check(texts, seeds, plan, batch_size)
    job = {
        "host": to.host.fingerprint, "sae": sae_fingerprint(to.sae), "site": str(to.site), "prompts": texts,
        "how": asked._asdict(), "strengths": strengths, "seeds": seeds, "stride": STRIDE,
        "controls": controls, "batch_size": batch_size, "options": options,
        "gates": {**gates, "space": None if weights is None else weights.tolist()},
        "shown": shown, "metrics": [*scorers, judge, target], "stats": stats,
    }  # fmt: skip
    with disk_errors(folder), _job(folder, plain(job)):
        if progress:
            n = len(batches) * (len(strengths) * (1 + _drawn(method, controls)) + 1)
            print(
                f"{len(texts)} prompts, {len(seeds)} seeds: {n} generations of up to {batch_size} pictures in {steps} "
                f"steps, {len(batches)} without steering and {len(batches) * len(strengths)} with; at {to.site.module}"
            )
        other = noise(seeds[0], len(texts))  # that of no picture that is reported
        known = _stats(to, stats, folder, anchors if method == "words" else None, texts, other)
        name, way = make_way(asked, to, gates, known, folder, other, progress)
        arms = doses(name, strengths, way)
        arms += _controls(arms, _drawn(method, controls), known)
        items = [Item(p, noise(seeds[0], i)) for i, p in enumerate(texts[:shown])]
        table, kept = _draw(to.host, batches, arms, metrics, items, folder / "parts", options, progress)
    return _write(Result(folder, name, table, ["moved", *metrics], kept, {"job": job, "name": name}), present, progress)


@contextmanager
def _job(folder: Path, job: dict[str, Any]) -> Iterator[None]:
    """:func:`same_job`; a run that is refused before it has drawn anything leaves nothing behind."""
    fresh = not (folder / "job.json").exists()
    if fresh and (own := [n for n in WRITTEN if (folder / n).exists()]):
        raise InputError(f"{folder} has {own[0]}, which no run of mmsae steer there wrote: give another --out.")
    with same_job(folder, job):
        try:
            yield
        except InputError:
            if fresh and not any(folder.glob("parts/*.parquet")):
                for name in ("job.json", "concept_stats.safetensors"):
                    (folder / name).unlink(missing_ok=True)
                for name in ("stats", "parts"):
                    shutil.rmtree(folder / name, ignore_errors=True)
                if not any(folder.iterdir()):
                    folder.rmdir()
            raise


def _drawn(method: str, n: int) -> int:
    """Concept vectors have no atoms of single features, so no random ones either."""
    return 0 if method == "concept" else n


def _controls(arms: Sequence[Arm], n: int, known: FeatureStats) -> list[Arm]:
    return controls(arms, n, known.live()) if n else []


def _stats(to: Any, given: str | None, folder: Path, anchors: Any, texts: Sequence[str], seed: int) -> FeatureStats:
    path = Path(given) if given else folder / "stats"
    if given or path.exists():
        return FeatureStats.load(path)
    return to.stats(texts if anchors is None else read_prompts(anchors), seed).save(path)


def _draw(
    host: Any,
    batches: Sequence[Sequence[Item]],
    arms: Sequence[Arm],
    metrics: Mapping[str, Metric],
    items: Sequence[Item],
    folder: Path,
    options: Mapping[str, Any],
    progress: bool,
) -> tuple[pd.DataFrame, dict]:
    """The table and the pictures to show, batch by batch; finished batches are read."""
    import pandas as pd

    tables, pictures, start, drawn = [], {}, time.monotonic(), 0
    folder.mkdir(parents=True, exist_ok=True)
    total = len(batches) * (len(arms) + 1)
    bars = {"disable": not progress, "unit": "generation", "desc": "steering"}
    with warnings.catch_warnings(), tqdm(total=total, **bars) as bar:
        warnings.filterwarnings("once", message=".*may break")
        for i, batch in enumerate(batches):
            file, shown = folder / f"{i:05d}.parquet", folder / f"{i:05d}.safetensors"
            if not file.exists():
                own: dict[tuple[str, float, int], dict[Item, Tensor]] = {}
                rows = run_batch(host, batch, arms, metrics, collect(items, own), bar.update, **options)
                _save_pictures(own, shown)
                with atomic_file(file) as temp:
                    rows.to_parquet(temp)
                drawn += 1
                left = (time.monotonic() - start) / drawn * (len(batches) - i - 1)
                if progress and drawn == 1 and left > 30:
                    bar.write(f"about {left / 60:.1f} minutes left")
            else:
                bar.update(len(arms) + 1)
            tables.append(pd.read_parquet(file))
            for key, found in _load_pictures(shown).items():
                pictures.setdefault(key, {}).update(found)
    return pd.concat(tables, ignore_index=True), pictures


def _save_pictures(kept: Mapping[tuple[str, float, int], Mapping[Item, Tensor]], path: Path) -> None:
    flat = {
        json.dumps([*key, *item]): (picture.clamp(0, 1) * 255).round().byte().contiguous()
        for key, own in kept.items()
        if key[2] < SHOWN_CONTROLS
        for item, picture in own.items()
    }
    with atomic_file(path) as temp:
        save_file(flat or {"none": torch.zeros(0)}, temp)


def _load_pictures(path: Path) -> dict[tuple[str, float, int], dict[Item, Tensor]]:
    out: dict[tuple[str, float, int], dict[Item, Tensor]] = {}
    for key, picture in load_file(path).items():
        if key != "none":
            name, strength, control, prompt, seed = json.loads(key)
            out.setdefault((name, strength, control), {})[Item(prompt, seed)] = picture.float() / 255
    return out


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as plain values; what is undefined is null."""
    return json.loads(frame.to_json(orient="records"))


def _write(result: Result, present: Callable[[Result], None] | None, progress: bool) -> Path:
    """Tables, pictures, results and report."""
    folder, table = result.folder, result.table
    means = summary(table)
    found = {m: verdicts(table, m) for m in result.metrics}
    result.results.update(summary=_records(means), verdicts={m: _records(v) for m, v in found.items()})
    with atomic_file(folder / "table.parquet") as temp:
        table.to_parquet(temp)
    with atomic_file(folder / "table.csv") as temp:
        table.to_csv(temp, index=False)
    if result.kept:
        write_png(before_after(result.kept, result.name), folder / "before_after.png")
    write_png(dose_plot(table, result.metrics, result.name), folder / "dose.png")
    if present is not None:
        present(result)
    with atomic_file(folder / "results.json") as temp:
        temp.write_text(json.dumps(plain(result.results), indent=1) + "\n")
    if progress:
        print(means[~means.control].drop(columns="control").to_string(index=False, float_format="%.3f"))
    return folder


def steer_command(host: str, sae: str, prompts: list[str], out: str = "runs/steer", **options: Any) -> Path:
    """Steer a diffusion model with SAE features and write what changed.

    Args:
        host: Diffusion pipeline, ``diffusers:FOLDER`` or ``diffusers:HUB_ID``.
        sae: SAE folder or hub id.
        prompts: Prompts, or text files (.txt) with one a line.
        out: Folder for pictures, tables, ``results.json`` and ``report.html``.
        **options: The other arguments of ``mmsae.steering.command.steer``.

    Returns:
        The folder of the result, with report.html in it.
    """
    return steer(host, sae, prompts, out, present=write_steer_report, **options)


def png(path: Path, alt: str, caption: str = "") -> Figure:
    """A PNG file as part of the page."""
    uri = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    return Figure(Markup('<img src="{}" alt="{}" style="max-width:100%">').format(uri, escape(alt)), caption)


def write_steer_report(result: Result) -> None:
    """Write ``report.html`` into the folder of a result."""
    job, folder = result.results["job"], result.folder
    means = [r for r in result.results["summary"] if not r["control"]]
    facts = [
        Fact("prompts", len(job["prompts"]), f"and {len(job['seeds'])} seeds"),
        Fact("strengths", ", ".join(f"{s:g}" for s in job["strengths"])),
        Fact("random controls", job["controls"], "at each strength, as large on every token"),
    ]
    pictures = folder / "before_after.png"
    sections = [
        Section(
            "Before and after",
            "Every row has the same prompt, noise and schedule. Random controls change the same tokens by as much, in"
            " the direction of other live features.",
            facts=facts,
            figures=[png(pictures, f"pictures before and after {result.name}")] if pictures.exists() else [],
        ),
        Section(
            "Dose response",
            "Means over pictures; bands are intervals of 95 % over prompts (bootstrap), grey ones reach from the lowest"
            " to the highest random control.",
            figures=[png(folder / "dose.png", f"{', '.join(result.metrics)} over strength")],
            tables=[_means(means), *(_verdicts(m, v) for m, v in result.results["verdicts"].items())],
        ),
    ]
    meta = {"site": job["site"], "steps": job["options"]["steps"], "guidance": job["options"]["guidance"]}
    render_report(folder / "report.html", f"Steering: {result.name}", sections, meta=meta, data=result.results)


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _means(rows: list[dict[str, Any]]) -> Table:
    columns = ["metric", "strength", "mean", "low", "high", "|dx|/|x|", "share of tokens"]
    names = ("strength", "mean", "low", "high", "relative", "share")
    return Table(columns, [[r["metric"], *(_number(r[n]) for n in names)] for r in rows], "By strength; 0 is unsteered")


def _verdicts(metric: str, rows: list[dict[str, Any]]) -> Table:
    columns = ["strength", "effect", "random", "effect size", "win rate", "controls beaten", "rho over strengths"]
    names = ("strength", "effect", "control", "size", "win_rate", "beaten", "rho")
    return Table(columns, [[_number(r[n]) for n in names] for r in rows], f"{metric}, beside random features")
