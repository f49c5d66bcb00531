"""What an OOD evaluation writes: tables and figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from mmsae.evaluation.ood.head import ID, DetectorScores
from mmsae.evaluation.rows import find, write_results
from mmsae.files import atomic_file
from mmsae.metrics.host.ood import roc
from mmsae.report.tables import markdown_table
from mmsae.sae.folder import read_config
from mmsae.types import IMAGE

TITLES = {"auroc": "AUROC", "fpr95_ood_positive": "FPR95, OOD positive", "fpr95_id_positive": "FPR95, ID positive",
          "aupr_in": "AUPR, ID positive", "aupr_out": "AUPR, OOD positive"}  # fmt: skip


def keys_of(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """``(control, features, score)`` of all detectors in the rows, in their order."""
    return list(dict.fromkeys((r["control"], r["features"], r["score"]) for r in rows if "auroc" in r))


def table(rows: Sequence[Mapping[str, Any]], names: Sequence[str], figure: str = "auroc") -> list[list[Any]]:
    """One row per detector: control, features, score, the figure on every set, and the means over near and far."""
    value = {(r["control"], r["features"], r["score"], r["set"]): r[figure] for r in rows if figure in r}
    groups = [g for g in ("near", "far") if any(k[3] == g for k in value)]
    return [["control", "features", "score", *names, *groups]] + [
        [*key, *(value.get((*key, s)) for s in (*names, *groups))] for key in keys_of(rows)
    ]


def markdown(
    rows: Sequence[Mapping[str, Any]], names: Sequence[str], notes: Sequence[str] = (), warnings: Sequence[str] = ()
) -> str:
    """All figures as tables, best of each column in bold, with n, notes and warnings."""
    out = []
    accuracy = find(rows, score="id_accuracy")
    n_id = next((r["n_id"] for r in rows if "n_id" in r), 0)
    counts = {r["set"]: r["n_ood"] for r in rows if r["set"] in names}
    out.append(f"{n_id:,} ID test images; OOD: " + ", ".join(f"{k} {v:,}" for k, v in counts.items()) + ".")
    if accuracy:
        whose = [r["features"] + (f" ({r['control']})" if r["control"] else "") for r in accuracy]
        said = ", ".join(f"{who} {r['value']:.3f}" for who, r in zip(whose, accuracy, strict=True))
        out.append(f"ID accuracy of the classifiers: {said}.")
    for figure, title in TITLES.items():
        header, *body = table(rows, names, figure)
        best = min if figure.startswith("fpr") else max
        top = [best((r[c] for r in body if r[c] is not None), default=None) for c in range(3, len(header))]
        bold = lambda v, best: f"**{v:.3f}**" if v is not None and round(v, 3) == round(best, 3) else v  # noqa: E731
        cells = [[*r[:3], *map(bold, r[3:], top)] for r in body]
        out += ["", f"{title}:", "", markdown_table(header, cells)]
    for title, lines in (("Warnings", warnings), ("Notes", notes)):
        out += ["", f"{title}:", "", *(f"- {line}" for line in lines)] if lines else []
    return "\n".join(out) + "\n"


def leaders(scored: DetectorScores, names: Sequence[str]) -> list[tuple[str, str, str]]:
    """Detectors worth a picture: the two best on raw features, the two best through the SAE, the best control."""
    mean = {
        key: float(np.mean([r["auroc"] for r in find(scored.rows, control=key[0], features=key[1], score=key[2])
                            if r["set"] in names]))
        for key in keys_of(scored.rows)
    }  # fmt: skip
    groups = {
        "raw": ([k for k in mean if not k[0] and k[1] in ("raw", "embed")], 2),
        "sae": ([k for k in mean if not k[0] and k[1] not in ("raw", "embed")], 2),
        "control": ([k for k in mean if k[0]], 1),
    }
    return [k for keys, n in groups.values() for k in sorted(keys, key=mean.get, reverse=True)[:n]]


def plot_ood(scored: DetectorScores, names: Sequence[str], path: str | Path) -> Path:
    """ROC curves of the leading detectors, and the distribution of the best one's confidences, for every OOD set."""
    from matplotlib.figure import Figure

    from mmsae.report.figures import PALETTE, write_png

    shown = leaders(scored, names)
    figure = Figure(figsize=(3.4 * len(names), 6.4), layout="constrained")
    axes = figure.subplots(2, len(names), squeeze=False)
    best = next((k for k in shown if not k[0] and k[1] not in ("raw", "embed")), shown[0])
    for top, bottom, name in zip(*axes, names, strict=True):
        for (control, kind, score), colour in zip(shown, PALETTE, strict=False):
            conf = scored.conf[control, score, kind]
            fpr, tpr = roc(conf[ID], conf[name])
            label = " ".join(filter(None, (f"[{control}]" if control else "", score, kind)))
            top.plot(fpr, tpr, color=colour, lw=1.4, ls="--" if control else "-", label=label)
        top.plot([0, 1], [0, 1], color="#bbbbbb", lw=0.8)
        top.set(title=name, xlabel="ID flagged", ylabel="OOD flagged" if name == names[0] else "")
        conf = scored.conf[best[0], best[2], best[1]]
        _distributions(bottom, conf[ID], conf[name])
        bottom.set(xlabel=f"{best[2]} on {best[1]} (larger = more ID)", ylabel="density" if name == names[0] else "")
    axes[0, -1].legend(frameon=False, fontsize=7, loc="lower right")
    axes[1, -1].legend(frameon=False, fontsize=8)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    return write_png(figure, path)


def _distributions(axis: Any, inside: Tensor, out: Tensor) -> None:
    from mmsae.report.figures import PALETTE

    both = np.concatenate([inside.numpy(), out.numpy()])
    edges = np.linspace(*np.percentile(both, [0.5, 99.5]), 41)
    edges = np.unique(edges) if edges[0] < edges[-1] else np.linspace(edges[0] - 1, edges[0] + 1, 41)
    for values, label, colour in ((inside, "ID", PALETTE[0]), (out, "OOD", PALETTE[1])):
        clipped = np.clip(values.numpy(), edges[0], edges[-1])
        axis.hist(clipped, edges, density=True, alpha=0.55, color=colour, label=label)


def fitted_on(scores: Sequence[str], n: int, training: Mapping[str, Any]) -> dict[str, int | None]:
    """``{score: images or rows that it was fitted on}``; the SAE's error was fitted when the SAE was."""
    return {s: training.get("rows", {}).get(IMAGE) if s == "recon" else n for s in scores}


def sae_training(sae: str) -> dict[str, Any]:
    """What the SAE's folder says about its training: conclusions from ``recon`` depend on what it has seen."""
    return read_config(sae)[1].get("training", {})


def write_ood(out: str | Path, scored: DetectorScores, about: dict[str, Any], names: list[str]) -> Path:
    """``results.json``, ``tables.md``, ``scores.npz`` (``control|features|score|set``) and ``ood.png``."""
    folder = Path(out)
    write_results(folder, scored.rows, about)
    with atomic_file(folder / "tables.md") as temp:
        temp.write_text(markdown(scored.rows, names, about["notes"], about["warnings"]))
    arrays = {
        f"{control}|{kind}|{score}|{name}": values.numpy()
        for (control, score, kind), sets in scored.conf.items()
        for name, values in sets.items()
    }
    with atomic_file(folder / "scores.npz") as temp, temp.open("wb") as handle:
        np.savez_compressed(handle, **arrays)
    plot_ood(scored, names, folder / "ood.png")
    return folder
