"""The markdown tables of ood_real.py."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmsae.report.tables import markdown_table

DENSE = ("msp", "max_logit", "energy", "vim", "react", "mds", "rmds", "knn")
NATIVE = ("recon", "rarity", "support", "cap_spearman", "cap_energy")
COLUMNS = [("", k) for k in ("raw", "code", "recon", "resid", "embed")] + [
    (c, k) for c in ("random", "pca") for k in ("code", "recon", "resid")
]
FIGURES = {"auroc": "AUROC", "fpr95_ood_positive": "FPR95, OOD positive"}


def ood_tables(results: Mapping[str, Any], near: str) -> list[str]:
    """Dense detectors by features, near and far; SAE-native scores and the pixel control on every set."""
    rows = [r for r in results["rows"] if "auroc" in r]
    at = {(r["control"], r["features"], r["score"], r["set"]): r for r in rows}
    columns = [c for c in COLUMNS if any(k[:2] == c for k in at)]
    names = [" ".join(filter(None, c)) for c in columns]
    sets = [s for s in dict.fromkeys(k[3] for k in at) if s not in ("near", "far")]
    accuracy = {(r["control"], r["features"]): r["value"] for r in results["rows"] if r["score"] == "id_accuracy"}
    out = []
    for group, title in (("far", f"mean over {', '.join(s for s in sets if s != near)}"), ("near", f"{near}")):
        for figure, name in FIGURES.items():
            body = [[s, *(at.get((*c, s, group), {}).get(figure) for c in columns)] for s in DENSE]
            if figure == "auroc" and group == "far":
                body.append(["ID accuracy", *(accuracy.get(c) for c in columns)])
            out += [f"{name}, {title}:", "", markdown_table(["score", *names], body), ""]
    for figure, name in FIGURES.items():
        body = [
            [f"{s}{f', {c}' if c else ''}", *(at[c, "codes", s, x][figure] for x in (*sets, "far"))]
            for s in NATIVE
            for c in ("", "random", "pca")
            if (c, "codes", s, "far") in at
        ]
        body.append(["pixel statistics", *(at["statistics", "pixels", "mds", x][figure] for x in (*sets, "far"))])
        out += [f"{name} of the scores of codes, and of plain pixel statistics:", ""]
        out += [markdown_table(["score", *sets, "far"], body), ""]
    best = sorted((k for k in at if k[3] == "far" and not k[0]), key=lambda k: -at[k]["auroc"])
    raw = next(k for k in best if k[1] in ("raw", "embed"))
    mine = next(k for k in best if k[1] not in ("raw", "embed"))
    said = (f"{k[2]} on {k[1]} {at[k]['auroc']:.3f}" for k in (raw, mine))
    out += [f"Best far AUROC on plain features: {next(said)}; through the SAE: {next(said)}.", ""]
    images = ", ".join(f"{k} {v:,}" for k, v in results["images"].items())
    return [*out, f"Pictures: {images}. Settings: {json.dumps(results['chosen'][''])}."]


def write_tables(out: Path, parts: Mapping[str, str]) -> Path:
    """``tables.md`` of all folders; ``parts`` is ``{folder prefix: name of its near set}``."""
    lines = []
    for prefix, near in parts.items():
        for name in ("trunk", "embed"):
            folder = out / prefix
            lines += [f"## {prefix or 'photographs'}, SAE at {name}", ""]
            lines += [(folder / f"zeroshot_{name}" / "table.md").read_text(), ""]
            lines += [*ood_tables(json.loads((folder / f"ood_{name}" / "results.json").read_text()), near), ""]
    path = out / "tables.md"
    path.write_text("\n".join(lines))
    return path
