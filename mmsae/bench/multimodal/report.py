"""Tables, figure and page of ``mmsae bench multimodal``, with the goals of the world beside its figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

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
    "zero_shot": "zero-shot: code",
    "zero_shot_host": "host ",
    "strength": "strength",
}
MARKERS = "os^D"
SHOWN_DEVIATION = ("fvu_image", "f1_same", "recall", "dead", "wrong_weighted", "zero_shot")


class Goal(NamedTuple):
    """What the default for pairs should reach on the generated world, F 128, k 8."""

    text: str
    value: Callable[[Mapping[str, float]], float]
    bound: float
    at_most: bool = False


GOALS = (
    Goal("FVU image", lambda r: r["fvu_image"], 0.045, True),
    Goal("FVU text", lambda r: r["fvu_text"], 0.030, True),
    Goal("cosine of pairs minus shuffled", lambda r: r["pair"] - r["shuffled"], 0.65),
    Goal("R@1", lambda r: r["recall"], 0.945),
    Goal("F1 same", lambda r: r["f1_same"], 0.82),
    Goal("AUC same", lambda r: r["auc_same"], 0.90),
    Goal("agreement", lambda r: r["agreement"], 0.80),
    Goal("bimodal energy", lambda r: r["bimodal_energy"], 0.98),
    Goal("wrong caption, weighted", lambda r: r["wrong_weighted"], 0.985),
    Goal("wrong caption, below the host's cosine", lambda r: r["wrong_host"] - r["wrong_weighted"], 0.01, True),
    Goal("dead", lambda r: r["dead"], 0.45, True),
)
GOALS_AT = "world, F 128, k 8"


def _rows(table: Mapping[str, Mapping[str, float]]) -> tuple[list[str], list[list[str]]]:
    shown = [c for c in COLUMNS if any(c in row for row in table.values())]

    def cell(row: Mapping[str, float], name: str) -> str:
        sd = row.get(f"{name}_sd") if name in SHOWN_DEVIATION else None
        return f"{row[name]:.3f}" + ("" if sd is None else f" ± {sd:.3f}")

    order = sorted(table, key=lambda n: -table[n]["recall"])
    return ["SAE", *(COLUMNS[c].strip() for c in shown)], [[n, *(cell(table[n], c) for c in shown)] for n in order]


def _goals(found: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """``(figure, goal, of the default, reached)``; empty where the goals' table or the default is not there."""
    row = found["tables"].get(GOALS_AT, {}).get(found["default"]["chosen"])
    if row is None:
        return []
    out = []
    for goal in GOALS:
        value = goal.value(row)
        reached = value <= goal.bound if goal.at_most else value >= goal.bound
        sign = "≤" if goal.at_most else "≥"
        out.append((goal.text, f"{sign} {goal.bound:g}", f"{value:.3f}", "yes" if reached else "no"))
    return out


def _choice(found: Mapping[str, Any]) -> str:
    candidates = found["default"]["candidates"].items()
    said = ", ".join(f"{name} ({c['tables']} tables, {c['fvu']:.3f})" for name, c in candidates)
    return (
        f"**{found['default']['chosen']}**: the SAE of the lowest FVU among those whose R@1 is at least .95 of the "
        "best and which give no warning, on rows that are not reported (the rule of `default_for_pairs`). Candidates, "
        f"with the tables in which they are and their mean FVU in units of the lowest: {said}."
    )


def multimodal_table(found: Mapping[str, Any]) -> str:
    """All tables, the choice of the default and the goals, in markdown."""
    parts = [f"Means over {len(found['seeds'])} seeds, {found['steps']} steps."]
    for place, table in found["tables"].items():
        parts += [f"### {place}", markdown_table(*_rows(table))]
    parts += ["### Default for pairs", _choice(found)]
    if goals := _goals(found):
        parts += [f"### Goals ({GOALS_AT})", markdown_table(["figure", "goal", "here", "reached"], goals)]
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
    sections += [Section(place, "Means over seeds.", tables=[Table(*_rows(t), place)]) for place, t in tables.items()]
    chosen = [Table(["figure", "goal", "here", "reached"], _goals(found), GOALS_AT)] if _goals(found) else []
    sections.append(Section("Default for pairs", _choice(found).replace("**", ""), tables=chosen))
    meta = {"seeds": found["seeds"], "steps": found["steps"]}
    lead = "Every SAE over pairs, with equal sizes, inputs, pairs and steps, beside an untrained one."
    return render_report(root / "report.html", "mmsae bench multimodal", sections, lead=lead, meta=meta, data=found)
