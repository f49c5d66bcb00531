"""The markdown report of real_input.py."""

from __future__ import annotations

import math
import shlex
import statistics
from typing import Any

from mmsae.report.tables import markdown_table

RANDOM = "random weights"
TABLES = {
    "Reconstruction and pairs": {
        "FVU image": lambda s: s["fvu"]["image"],
        "FVU text": lambda s: s["fvu"]["text"],
        "cosine of pairs": lambda s: s["code_cosine"]["pair"],
        "shuffled": lambda s: s["code_cosine"]["shuffled"],
        "difference": lambda s: s["code_cosine"]["difference"],
        "top agreement": lambda s: s["top_concept_agreement"],
        "bimodal energy": lambda s: s["bimodal"]["energy"],
        "dead": lambda s: s["dead_fraction"],
    },
    "Zero-shot accuracy (raw is alpha = 0), and AUROC of true captions against captions of another class": {
        **{k: lambda s, k=k: s["zero_shot"][k] for k in ("raw", "recon", "code", "enhanced", "alpha")},
        "code / raw": lambda s: s["zero_shot"]["code"] / s["zero_shot"]["raw"],
        "AUROC code": lambda s: s["wrong_class"]["pair_code"],
        "AUROC weighted": lambda s: s["wrong_class"]["pair_weighted"],
    },
}
for by, right in (("class", "any caption of the class is right"), ("caption", "only equal captions are right")):
    TABLES[f"Retrieval among all test pairs, {right}"] = {
        f"{arrow} R@{k}": lambda s, by=by, way=way, k=k: s["recall"][by][way][k]
        for way, arrow in (("image_to_text", "image → text"), ("text_to_image", "text → image"))
        for k in (1, 5, 10)
    }


def cell(column, scores: list[dict[str, Any]]) -> str:
    """Mean, and in brackets the standard deviation over seeds."""
    values = [column(s) for s in scores]
    mean = f"{statistics.fmean(values):.3f}"
    return f"{mean} ({statistics.stdev(values):.3f})" if len(values) > 1 else mean


def markdown(results: dict[str, Any]) -> str:
    """Host, tables, chosen settings, warnings and commands."""
    host, lines = results["host"], []
    lines.append(
        f"Host `{host['name']}`; {host['train']:,} training, {host['val']:,} validation, {host['test']:,} test pairs "
        f"of {host['classes']} classes and {host['captions']} captions. Zero-shot of the host "
        f"{host['zero_shot']['raw']:.3f}; AUROC of true captions against captions of another class: cosine "
        f"{host['wrong_class']['clip']:.3f}, centred cosine {host['wrong_class']['clip_centred']:.3f}."
    )
    for size, part in results["sizes"].items():
        lines += ["", f"## {size}, seeds {', '.join(map(str, results['seeds']))}"]
        for title, columns in TABLES.items():
            rows = {**part["scores"], **({"host embeddings": [host]} if title.startswith("Retr") else {})}
            cells = [[name, *(cell(f, scores) for f in columns.values())] for name, scores in rows.items()]
            lines += ["", f"{title}:", "", markdown_table(["", *columns], cells)]
        lines += ["", "Warnings:", ""]
        said = [
            f"- {name}, seed {seed}: {w}"
            for name, scores in part["scores"].items()
            for seed, s in zip(results["seeds"], scores, strict=True)
            for w in s["warnings"]
        ]
        lines += said or ["- none"]
        grid = {name: {(g["lr"], g["steps"]): g for g in found["grid"]} for name, found in part["settings"].items()}
        tried = next(iter(grid.values()))
        lines += ["", "Validation FVU (mean of both modalities; chosen in bold, ! where the codes gave a warning):", ""]
        rows = []
        for name, found in part["settings"].items():
            values = ((g, f"{g.get('fvu', math.nan):.4f}{'!' * bool(g.get('warnings'))}") for g in grid[name].values())
            rows.append([name, *(f"**{text}**" if g == found["chosen"] else text for g, text in values)])
        lines.append(markdown_table(["", *(f"lr {lr:g}, {steps} steps" for lr, steps in tried)], rows))
    return "\n".join([*lines, "", "## Commands", "", "```bash", *map(shlex.join, results["commands"]), "```", ""])
