"""The page of ``mmsae steer``."""

from __future__ import annotations

import base64
import math
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from mmsae.report.figures import Figure
from mmsae.report.page import Fact, Section, Table, render_report


def png(path: Path, alt: str, caption: str = "") -> Figure:
    """A PNG file as part of the page."""
    uri = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    return Figure(Markup('<img src="{}" alt="{}" style="max-width:100%">').format(uri, escape(alt)), caption)


def write_report(folder: Path, results: dict[str, Any]) -> None:
    """Write ``report.html`` into a folder that holds the figures, from the contents of its ``results.json``."""
    job, name, images = results["job"], results["name"], folder / "before_after.png"
    facts = [
        Fact("prompts", len(job["prompts"]), f"and {len(job['seeds'])} seeds"),
        Fact("strengths", ", ".join(f"{s:g}" for s in job["strengths"])),
        Fact("random controls", job["controls"], "at each strength, as large on every token"),
    ]
    means = [r for r in results["summary"] if not r["control"]]
    features = results.get("features", {})
    sections = [
        Section(
            "Before and after",
            "Every row has the same prompt, noise and schedule. Random controls change the same tokens by as much, in"
            " the direction of other live features.",
            facts=facts,
            tables=[_features(features)] if features else [],
            figures=[png(images, f"images before and after {name}")] if images.exists() else [],
        ),
        Section(
            "Dose response",
            "Means over images; bands are intervals of 95 % over prompts (bootstrap), grey ones reach from the lowest"
            " to the highest random control.",
            figures=[png(folder / "dose.png", f"{', '.join(results['verdicts'])} over strength")],
            tables=[_means(means), *(_verdicts(m, v) for m, v in results["verdicts"].items())],
        ),
    ]
    meta = {"site": job["site"], "steps": job["options"]["steps"], "guidance": job["options"]["guidance"]}
    called = ", ".join(said["name"] for said in features.values() if said["name"])
    title = f"Steering: {name}" + (f" ({called})" if called else "")
    render_report(folder / "report.html", title, sections, meta=meta, data=results)


def _numbers(row: dict[str, Any], names: tuple[str, ...]) -> list[float]:
    return [math.nan if row[n] is None else row[n] for n in names]


def _means(rows: list[dict[str, Any]]) -> Table:
    columns = ["metric", "strength", "mean", "low", "high", "|dx|/|x|", "share of tokens"]
    names = ("strength", "mean", "low", "high", "relative", "share")
    return Table(columns, [[r["metric"], *_numbers(r, names)] for r in rows], "By strength; 0 is unsteered")


def _features(features: dict[str, Any]) -> Table:
    rows = [[f"#{j}", n["name"] or "no name held up", n["method"], n["auroc"], n["by"]] for j, n in features.items()]
    return Table(["feature", "called", "by method", "AUROC of the name", "by"], rows, "What the features are called")


def _verdicts(metric: str, rows: list[dict[str, Any]]) -> Table:
    columns = ["strength", "effect", "random", "effect size", "win rate", "controls beaten", "rho over strengths"]
    names = ("strength", "effect", "control", "size", "win_rate", "beaten", "rho")
    return Table(columns, [_numbers(r, names) for r in rows], f"{metric}, beside random features")
