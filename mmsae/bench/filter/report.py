"""Table, figure and page of ``mmsae bench filter``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from mmsae.report.tables import markdown_table

KINDS = {"swapped": "swapped caption", "attribute": "wrong attribute", "answer": "wrong answer"}
LENGTH = {"spearman_n_text": "length", "spearman_l0": "l0", "spearman_co_l0": "co_l0"}


def _spread(row: dict[str, Any], key: str, digits: int = 3) -> str:
    sd = row[f"{key}_sd"]
    return f"{row[key]:.{digits}f}" + ("" if sd is None else f" ± {sd:.{digits}f}")


def _number(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.2f}"


def _accuracy_rows(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    columns = ["kept by", "damaged", "accuracy", "random", "adversarial", "caption loss", "of all data", "above chance"]
    base = results["base"]
    rows = [["(base, not tuned)", "–", *(f"{base[k]:.3f}" for k in ("accuracy", "random", "adversarial"))]]
    rows[0] += [f"{base['caption_loss']:.3f}", "–", "–"]
    order = sorted(results["summary"].items(), key=lambda item: -item[1]["accuracy"])
    for arm, row in order:
        cells = [_spread(row, k) for k in ("accuracy", "random", "adversarial", "caption_loss")]
        rows.append([arm, f"{row['damaged']:.0%}", *cells, f"{row['ratio']:.0%}", _number(row["ratio_above_chance"])])
    return columns, rows


def _detection_rows(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    columns = ["score", *KINDS.values(), *(f"ρ {n}" for n in LENGTH.values())]
    rows = [
        [name, *(_number(row[k]) for k in KINDS), *(_number(row[k]) for k in LENGTH)]
        for name, row in results["detection"].items()
    ]
    return columns, rows


def _lead(summary: dict[str, Any], arm: str, n: int) -> float | None:
    """How many standard errors of the difference of two means over ``n`` seeds an arm is above the random half."""
    if n < 2 or "random" not in summary:
        return None
    a, b = summary[arm], summary["random"]
    error = math.sqrt((a["accuracy_sd"] ** 2 + b["accuracy_sd"] ** 2) / n)
    return (a["accuracy"] - b["accuracy"]) / error if error else None


def verdict(results: dict[str, Any]) -> str:
    """What is seen of the claim, in a few sentences."""
    s, paper = results["summary"], results["paper"]
    codes = [a for a in s if a.split("/")[0] in ("cos_code", "cos_algorithm", "cos_mean", "l0", "l1", "co_l0", "co_l1")]
    held = [a for a in codes if s[a]["claim"]]
    text = (
        f"The paper says: more than {paper['result']:.0%} of the full-data result with less than {paper['data']:.0%} of"
        f" the data. All data: {s['all']['accuracy']:.3f}; base model: {results['base']['accuracy']:.3f}. "
    )
    for arm in ("random", "oracle"):
        if arm in s:
            text += f"The {arm} half: {s[arm]['accuracy']:.3f}, {s[arm]['ratio']:.0%} of all data. "
    if codes:
        best = max(codes, key=lambda a: s[a]["accuracy"])
        text += f"Best half by an SAE-V score ({best}): {s[best]['accuracy']:.3f}, {s[best]['ratio']:.0%}. "
        text += f"Above {paper['result']:.0%}: {', '.join(held) if held else 'none'} of {len(codes)} SAE-V scores. "
        lead = {a: _lead(s, a, len(results["seeds"])) for a in codes}
        clear = [a for a in codes if lead[a] is not None and lead[a] > 2]
        if lead[best] is not None:
            text += f"More than 2 standard errors above the random half: {', '.join(clear) if clear else 'none'} "
            text += f"({best}: {lead[best]:.1f}). "
        text += f"Above the base model: {', '.join(a for a in codes if s[a]['gain'] > 0) or 'none'}. "
    others = [a for a in s if a not in codes and a not in ("all", "random", "oracle")]
    if others:
        best = max(others, key=lambda a: s[a]["accuracy"])
        text += f"Best half without SAE-V ({best}): {s[best]['accuracy']:.3f}, {s[best]['ratio']:.0%}."
    return text.strip()


def filter_table(results: dict[str, Any]) -> str:
    """Both tables and the verdict, in markdown."""
    seeds = len(results["seeds"])
    return (
        f"Yes/no accuracy on held-out clean scenes after fine-tuning, {seeds} seed{'s' * (seeds > 1)}:\n\n"
        + markdown_table(*_accuracy_rows(results))
        + "\n\nAUROC of finding the damage (0.5: blind), and Spearman's ρ among captions:\n\n"
        + markdown_table(*_detection_rows(results))
        + f"\n\n{verdict(results)}\n"
    )


def write_filter_report(root: Path, results: dict[str, Any]) -> Path:
    """Write ``accuracy.png`` and ``report.html``."""
    from mmsae.report import Section, Table, figure, render_report
    from mmsae.report.figures import GREY, canvas, write_png

    s = results["summary"]
    order = sorted(s, key=lambda a: s[a]["accuracy"])
    with canvas(width=7.2, height=1.2 + 0.28 * len(order)) as (fig, ax):
        ax.barh(order, [s[a]["accuracy"] for a in order], xerr=[s[a]["accuracy_sd"] or 0 for a in order], alpha=0.7)
        for y, arm in enumerate(order):
            runs = [r["accuracy"] for r in results["arms"][arm]]
            ax.plot(runs, [y] * len(runs), "k.", markersize=4)
        marks = {"all data": (s["all"]["accuracy"], "--"), "110%": (1.1 * s["all"]["accuracy"], ":")}
        marks |= {"base": (results["base"]["accuracy"], "-.")}
        for name, (x, style) in marks.items():
            ax.axvline(x, ls=style, lw=1.2, color=GREY, label=f"{name} {x:.3f}")
        ax.set_xlim(0.4, 1.0)
        ax.set_xlabel("accuracy on yes/no questions, held-out scenes")
        ax.legend(loc="lower right")
        write_png(fig, root / "accuracy.png", dpi=130, facecolor="white")
        shown = figure(fig, "accuracy of every arm", "Mean and deviation over seeds; a dot is one fine-tuning")
    sections = [
        Section(
            "What is seen of the claim",
            verdict(results),
            [shown],
            [Table(*_accuracy_rows(results), "Fine-tuned on all data, and on the half that a score ranks first")],
        ),
        Section(
            "What the scores find",
            "AUROC: chance that an undamaged sample scores higher than a damaged one of the same task; 0.5 is blind. "
            "Scores named `/question` read the prompt alone, as the published ones do, and so never see an answer.",
            tables=[Table(*_detection_rows(results), "Detection of each kind of damage; ρ is Spearman's")],
        ),
    ]
    meta = {"damaged share": results["damage"], "seeds": results["seeds"], "CPU seconds": results["cpu_seconds"]}
    return render_report(
        root / "report.html",
        "mmsae bench filter: half of the data, chosen",
        sections,
        lead="One base model, fine-tuned for equally many steps on a set with known damage and on halves of it.",
        meta=meta,
        data={k: v for k, v in results.items() if k != "arms"},
    )
