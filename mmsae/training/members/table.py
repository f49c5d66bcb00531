"""What came of the members of a run: a table, and FVU over L0."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmsae.files import atomic_file, write_json
from mmsae.training.members.options import SHORT, names_of
from mmsae.types import Site

Row = dict[str, Any]
TABLES = ("members.json", "members.md", "members.png")


def figures(run: Path) -> Row:
    """Latents, steps and figures of the last validation of the SAE that a run left, by ``fvu/image`` and such."""
    block = json.loads((run / "sae" / "cfg.json").read_text(encoding="utf-8"))["mmsae"]
    values = {name.removeprefix("val/"): v for name, v in block["training"]["validation"].items()}
    return {"d_sae": block["d_sae"], "steps": block["training"]["steps"], **values}


def sites_of(run: Path) -> str:
    """Where the SAE that a run left reads, as ``blocks.3:out[cls]``; of several modalities one after the other."""
    sites = json.loads((run / "sae" / "cfg.json").read_text(encoding="utf-8"))["mmsae"]["sites"]
    return ", ".join(Site(**site).spec for site in sites.values())


def of_stopped(why: str, good: int | None) -> Row:
    """What is known of a member that diverged; ``good`` is the step after which it is kept, None where it is not."""
    return {"stopped": why} | ({} if good is None else {"last_good": good})


def write(
    root: Path, options: Mapping[str, Mapping[str, Any]], stopped: Mapping[str, str], good: Mapping[str, int]
) -> None:
    """Write ``members.json``, ``members.md`` and, where there was a validation, ``members.png`` into a run's folder.

    Args:
        root: The folder, with a folder for each member.
        options: ``{name: {dotted option: value}}``.
        stopped: ``{name: why}`` of those that have no figures.
        good: ``{name: step}`` after which those are kept.
    """
    from mmsae.report.tables import markdown_table

    differ = names_of(list(options.values()))
    rows: list[Row] = []
    for name, given in options.items():
        own = {d: given[SHORT.get(d, d)] for d in differ if SHORT.get(d, d) in given}
        found = of_stopped(stopped[name], good.get(name)) if name in stopped else figures(root / name)
        rows.append({"member": name, **own, **found})
    write_json(root / "members.json", {"members": rows})
    names = list(dict.fromkeys(n for r in rows for n in r if n.split("/")[0] in ("fvu", "l0", "dead")))
    columns = ["member", "d_sae", *names, *(n for n in ("stopped", "last_good") if any(n in r for r in rows))]
    with atomic_file(root / "members.md") as temp:
        temp.write_text(markdown_table(columns, [[r.get(c) for c in columns] for r in rows]) + "\n", encoding="utf-8")
    if drawn := [r for r in rows if "stopped" not in r and names]:
        curves = [d for d in differ if d not in ("k", "seed")]
        for r in drawn:
            r["curve"], r["point"] = ", ".join(f"{c} {r[c]}" for c in curves if r.get(c) is not None), r.get("k")
        with atomic_file(root / "members.png") as temp:
            draw(drawn, temp)


def draw(rows: Sequence[Row], path: Path) -> None:
    """The picture: FVU over L0 above, share of latents that never fire on the validation data below.

    Args:
        rows: Figures of SAEs, and to which ``curve`` and which ``point`` of it each belongs; those of one point are
            averaged, whiskers go from the least to the largest value.
        path: PNG file.
    """
    from matplotlib.figure import Figure

    from mmsae.metrics.statistics import whiskers

    modalities = [name.removeprefix("fvu/") for name in rows[0] if name.startswith("fvu/") and name != "fvu/joint"]
    fig = Figure(figsize=(4.2 * len(modalities) + 0.6, 5.4), layout="constrained")
    axes = fig.subplots(2, len(modalities), sharex=True, sharey="row", squeeze=False, height_ratios=(2, 1))
    for column, m in zip(axes.T, modalities, strict=True):
        for curve in dict.fromkeys(row["curve"] for row in rows):
            own = [row for row in rows if row["curve"] == curve and f"fvu/{m}" in row]
            groups = [[r for r in own if r["point"] == point] for point in dict.fromkeys(r["point"] for r in own)]
            l0 = [_mean(g, f"l0/{m}") for g in groups]
            for ax, name in zip(column, (f"fvu/{m}", f"dead/{m}"), strict=True):
                middle = [_mean(g, name) for g in groups]
                values = [[r[name] for r in g] for g in groups]
                ends = [whiskers(y, min(v), max(v)) for y, v in zip(middle, values, strict=True)]
                ax.errorbar(l0, middle, list(zip(*ends, strict=True)), marker="o", ms=4, capsize=2, label=curve)
        column[0].set_title(m)
        column[1].set_xlabel("L0 (latents that fire per row)")
        column[1].set_xscale("log", base=2)
        column[1].xaxis.set_major_formatter("{x:g}")
    axes[0, 0].set_ylabel("FVU (share of variance unexplained)")
    axes[1, 0].set_ylabel("share of latents dead")
    if any(row["curve"] for row in rows):
        axes[0, -1].legend(frameon=False)
    for ax in axes.flat:
        ax.grid(alpha=0.3)
        ax.set_ylim(0, 1.05 * max(ax.dataLim.y1, 0.1))
    fig.savefig(path, dpi=150, format="png")


def _mean(rows: list[Row], name: str) -> float:
    return sum(row[name] for row in rows) / len(rows)
