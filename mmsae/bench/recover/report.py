"""Table, figure and page of ``mmsae bench recover``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmsae.bench.recover import fast
from mmsae.bench.recover.claims import answers
from mmsae.report.tables import markdown_table

COLUMNS = {
    "cosine": "matched cosine",
    "found": "found (> .9)",
    "precision": "precision",
    "recall": "recall",
    "fvu": "FVU",
    "l0": "L0",
    "dead": "dead",
    "predictable": "error predictable",
    "absorption": "absorption",
    "ce": "CE",
    "ce_raw": "CE raw",
    "strength": "strength",
    "seconds": "CPU s",
}


def _rows(variants: Mapping[str, Mapping[str, float]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of one world, best matched cosine first; deviations over seeds behind the mean."""
    shown = [c for c in COLUMNS if any(c in row for row in variants.values())]
    if all(row["strength"] == 1 for row in variants.values()):
        shown.remove("strength")

    def cell(row: Mapping[str, float], name: str) -> str:
        digits = 1 if name in ("seconds", "l0") else 2 if name == "strength" else 3
        sd = row.get(f"{name}_sd") if name in ("cosine", "fvu", "absorption", "ce") else None
        return f"{row[name]:.{digits}f}" + ("" if sd is None else f" ± {sd:.{digits}f}")

    order = sorted(variants, key=lambda v: -variants[v]["cosine"])
    return ["SAE", *(COLUMNS[c] for c in shown)], [[v, *(cell(variants[v], c) for c in shown)] for v in order]


def recover_table(results: Mapping[str, Any], about: Mapping[str, str]) -> str:
    """Every world's table and the claims, in markdown."""
    parts = [f"Means over {len(results['seeds'])} seeds, {results['steps']} steps of {results['rows']} rows each."]
    for world, variants in results["worlds"].items():
        parts += [f"### {world}: {about[world]}", markdown_table(*_rows(variants))]
    if rows := results[fast.NAME]:
        parts += [f"### {fast.NAME}: {fast.ABOUT}", markdown_table(*fast.fast_table(rows))]
    parts += ["### Claims of papers", markdown_table(["claim", "here", "figures"], _answers(results))]
    return "\n\n".join(parts) + "\n"


def _answers(results: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    return answers(results["worlds"] | {fast.NAME: results[fast.NAME]})


def _recovery(path: Path, worlds: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Any:
    """Draw what every SAE recovers of every world."""
    from mmsae.report import figure
    from mmsae.report.figures import GREY, PALETTE, canvas, write_png

    names = list(dict.fromkeys(v for variants in worlds.values() for v in variants))
    with canvas(len(worlds), width=2.6 + 1.7 * len(worlds), height=1.2 + 0.22 * len(names), squeeze=False) as (
        fig,
        axes,
    ):
        for ax, (world, variants) in zip(axes[0], worlds.items(), strict=True):
            for y, name in enumerate(reversed(names)):
                if name in variants:
                    row = variants[name]
                    ax.plot([1 - row["fvu"], row["cosine"]], [y, y], color=GREY, lw=1)
                    ax.plot(1 - row["fvu"], y, "o", mfc="none", color=PALETTE[5], ms=4)
                    ax.plot(row["cosine"], y, "o", color=PALETTE[0], ms=5)
            ax.set(title=world.replace("_", " "), xlim=(-0.02, 1.02), ylim=(-0.6, len(names) - 0.4))
            ax.set_yticks(range(len(names)), list(reversed(names)) if ax is axes[0][0] else [""] * len(names))
        fig.supxlabel("filled: matched cosine of the atoms; ring: explained variance", fontsize=9.5)
        write_png(fig, path, dpi=130, facecolor="white")
        return figure(fig, "matched cosine and explained variance of every SAE on every world")


def write_recover_report(root: Path, results: dict[str, Any], about: Mapping[str, str]) -> Path:
    """Write ``table.md``, ``recovery.png`` and ``report.html``; returns the page."""
    from mmsae.report import Section, Table, render_report

    (root / "table.md").write_text(recover_table(results, about))
    worlds = results["worlds"]
    shown = [_recovery(root / "recovery.png", worlds)] if worlds else []
    sections = [Section("What is recovered", "Reconstructing well and finding the atoms are two things.", shown)]
    sections += [
        Section(world.replace("_", " "), about[world] + ".", tables=[Table(*_rows(variants), "Means over seeds")])
        for world, variants in worlds.items()
    ]
    if rows := results[fast.NAME]:
        tables = [Table(*fast.fast_table(rows), "Means over seeds")]
        sections.append(Section(fast.NAME, fast.ABOUT + ".", tables=tables))
    head = ["claim", "here", "figures"]
    said = "Rules were fixed before the figures; strengths were chosen with another seed."
    sections.append(Section("Claims of papers", said, tables=[Table(head, _answers(results), "What is seen of them")]))
    meta = {"seeds": results["seeds"], "steps": results["steps"], "rows a step": results["rows"]}
    return render_report(
        root / "report.html",
        "mmsae bench recover: known dictionaries",
        sections,
        lead="Every SAE on activations of which the atoms and the codes are known.",
        meta=meta,
        data=results,
    )
