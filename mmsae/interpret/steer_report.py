"""``mmsae steer``: steering with a report in which a person sees before and after, the dose and the random controls."""

from __future__ import annotations

import base64
import math
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from mmsae.interpret.figures import Figure
from mmsae.interpret.report import Fact, Section, Table, render_report
from mmsae.steering.command import Result, steer


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
