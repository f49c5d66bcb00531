"""Tables, figure and page of ``mmsae bench multimodal``, with the goals beside the figures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmsae.bench.multimodal.goals import reached
from mmsae.report.tables import markdown_table

COLUMNS = {
    "fvu_image": "FVU image",
    "fvu_text": "FVU text",
    "pair": "cosine of pairs",
    "shuffled": "shuffled",
    "bimodal": "bimodal latents",
    "bimodal_energy": "bimodal energy",
    "f1_image": "F1 image",
    "f1_text": "F1 text",
    "f1_same": "F1 same",
    "auc_same": "AUC same",
    "agreement": "agreement",
    "recall": "R@1",
    "choice_l0": "L0",
    "dead": "dead",
    "wrong_code": "wrong caption: code",
    "wrong_weighted": "weighted",
    "wrong_host": "host",
    "wrong_centred": "host, centred",
    "zero_shot": "zero-shot: code",
    "zero_shot_host": "host ",
    "strength": "strength",
}
MARKERS = "os^D"
GOALS_OF = ("sparc", "paired_topk")  #: SAEs that the goals were set for; the chosen one is asked beside them.
SHOWN_DEVIATION = ("fvu_image", "f1_same", "recall", "dead", "wrong_weighted", "zero_shot")


def _rows(table: Mapping[str, Mapping[str, float]]) -> tuple[list[str], list[list[str]]]:
    shown = [c for c in COLUMNS if any(c in row for row in table.values())]

    def cell(row: Mapping[str, float], name: str) -> str:
        sd = row.get(f"{name}_sd") if name in SHOWN_DEVIATION else None
        return f"{row[name]:.3f}" + ("" if sd is None else f" ± {sd:.3f}")

    order = sorted(table, key=lambda n: -table[n].get("recall", table[n]["wrong_weighted"]))
    return ["SAE", *(COLUMNS[c].strip() for c in shown)], [[n, *(cell(table[n], c) for c in shown)] for n in order]


def _choice(found: Mapping[str, Any]) -> str:
    candidates = found["default"]["candidates"].items()
    said = ", ".join(f"{name} ({c['tables']} tables, {c['fvu']:.3f})" for name, c in candidates)
    return (
        f"**{found['default']['chosen']}**: the SAE of the lowest FVU among those whose R@1 is at least .95 of the "
        "best and which give no warning, on rows that are not reported (the rule of `default_for_pairs`). Candidates, "
        f"with the tables in which they are and their mean FVU in units of the lowest: {said}."
    )


def _all(found: Mapping[str, Any]) -> dict[str, Mapping[str, Mapping[str, float]]]:
    return {**found["tables"], **found["conditions"]}


def _goals(found: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    names = dict.fromkeys(n for n in (found["default"]["chosen"], *GOALS_OF) if n)
    return reached(_all(found), [n for n in names if any(n in table for table in _all(found).values())])


def multimodal_table(found: Mapping[str, Any]) -> str:
    """All tables, the choice of the default and the goals, in markdown."""
    parts = [f"Means over {len(found['seeds'])} seeds, {found['steps']} steps."]
    for place, table in _all(found).items():
        parts += [f"### {place}", markdown_table(*_rows(table))]
    parts += ["### Default for pairs", _choice(found)]
    head, goals = _goals(found)
    if goals:
        parts += ["### Goals", markdown_table(head, goals)]
    return "\n\n".join(parts) + "\n"


def write_multimodal_report(root: Path, found: dict[str, Any]) -> Path:
    """Write ``table.md``, ``front.png`` and ``report.html``; returns the page."""
    from mmsae.report import Section, Table, figure, render_report
    from mmsae.report.figures import PALETTE, canvas, write_png

    (root / "table.md").write_text(multimodal_table(found))
    tables = found["tables"]
    with canvas(len(tables), width=1.0 + 4.2 * len(tables), height=5.2, squeeze=False) as (fig, axes):
        for ax, (place, table) in zip(axes[0], tables.items(), strict=True):
            for i, (name, row) in enumerate(table.items()):
                x, y = (row["fvu_image"] + row["fvu_text"]) / 2, row["recall"]
                ax.plot(x, y, MARKERS[i // len(PALETTE)], color=PALETTE[i % len(PALETTE)], label=name, ms=7, alpha=0.8)
            ax.set(title=place, xlabel="FVU, mean of both modalities", ylabel="R@1 from codes", xscale="log")
            ax.set_xticks([0.02, 0.05, 0.1, 0.2, 0.5], ["0.02", "0.05", "0.1", "0.2", "0.5"])
            ax.minorticks_off()
        handles = axes[0][0].get_lines()
        fig.legend(handles, [h.get_label() for h in handles], loc="outside lower center", ncols=4, fontsize=8.5)
        write_png(fig, root / "front.png", dpi=130, facecolor="white")
        shown = figure(fig, "R@1 against FVU of every SAE over pairs")
    sections = [Section("What is bought with the error", "Up and to the left is better.", [shown])]
    sections += [
        Section(place, "Means over seeds.", tables=[Table(*_rows(t), place)]) for place, t in _all(found).items()
    ]
    head, goals = _goals(found)
    chosen = [Table(head, goals, "Goals")] if goals else []
    sections.append(Section("Default for pairs", _choice(found).replace("**", ""), tables=chosen))
    meta = {"seeds": found["seeds"], "steps": found["steps"]}
    lead = "Every SAE over pairs, with equal sizes, inputs, pairs and steps, beside an untrained one."
    return render_report(root / "report.html", "mmsae bench multimodal", sections, lead=lead, meta=meta, data=found)
