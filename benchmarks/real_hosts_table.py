"""The markdown tables of real_hosts.py: figures over seeds, beside their controls."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from real_hosts_findings import findings, read_tables

from mmsae.report.tables import markdown_table

SHORT = "In short"
KINDS = ("card", "ood")  # folders of a finished seed
Rows = Sequence[Mapping[str, Any]]


def over_seeds(seeds: Iterable[Rows]) -> dict[tuple[str, ...], tuple[float, float, float, int]]:
    """``{(head, set, score, features, control): (mean, low, high, seeds)}``.

    ``low`` and ``high`` hold every seed's value and, where a row has one, its 95% interval over images or concepts.
    """
    found: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for rows in seeds:
        for r in rows:
            if r["value"] is not None:
                found.setdefault(tuple(r[k] for k in ("head", "set", "score", "features", "control")), []).append(r)
    out = {}
    for key, some in found.items():
        value = [r["value"] for r in some]
        low, high = ([r[k] for r in some if r.get(k) is not None] for k in ("low", "high"))
        out[key] = (sum(value) / len(value), min(value + low), max(value + high), len(value))
    return out


def cell(figure: tuple[float, float, float, int] | None) -> str:
    """``mean (low-high)``."""
    return "–" if figure is None else f"{figure[0]:.3f} ({figure[1]:.3f}–{figure[2]:.3f})"


def column(key: tuple[str, ...]) -> str:
    """``code``, ``code, random``."""
    return f"{key[3]}, {key[4]}" if key[4] else key[3]


def table(figures: Mapping[tuple[str, ...], Any], head: str) -> str:
    """Figures of a head: a row per set and score, a column per features and control."""
    own = {k: v for k, v in figures.items() if k[0] == head}
    columns = list(dict.fromkeys(column(k) for k in own))
    lines = list(dict.fromkeys((k[1], k[2]) for k in own))
    at = {(k[1], k[2], column(k)): v for k, v in own.items()}
    rows = [[*line, *(cell(at.get((*line, c))) for c in columns)] for line in lines]
    return markdown_table(["set", "score", *columns], rows)


def read(files: Iterable[Path]) -> list[dict[str, Any]]:
    """The contents of some results.json."""
    return [json.loads(f.read_text(encoding="utf-8")) for f in files]


ABOUT = {
    "embeddings": "one row an image of an EfficientNet-Lite0 of ImageNet",
    "maps": "7 x 7 places of the same host's last blocks",
    "patches": "16 x 16 last patches of a ViT-S/14 fine-tuned for saliency",
}
INTRO = """# Pretrained hosts

Written by `python benchmarks/real_hosts.py`, whose head says how; dates and sizes are in
[Evaluation](evaluation.md#pretrained-hosts), and what stands under *In short* is made from the tables. *Code* are the
latents of the SAE, *recon* what it rebuilds, *resid* what it misses; controls are raw features (*raw*) and the same of
random weights (*random*) and of principal components (*pca*).
Each figure is a mean over seeds; in brackets the range of the seeds and of their 95% intervals over images or concepts.
Two figures are *not told apart* where these ranges overlap.
"""
LIMITS = """### What it cannot show

- Whether latents mean what no class says: a latent counts as pure only where its images share one of 140 classes, and
  one of a colour, a texture or a part of many things counts as none.
- A fair best of many against raw channels and components, which are fewer than latents; random weights are as many.
- Anything of other SAEs or sizes: all are TopK with k 32, of at most 5,000 images of 64 pixels, which both hosts see
  enlarged. FVU, and the share of latents that are never on, depend on that number.
- What holds for other images of this kind: seeds differ in the SAE's weights and order of data, not in the images, and
  intervals are over the images or concepts of one set.
- OOD detection that is hard: the sets are digits, garments, drawings and photographs of people, none is near.
- What a semantic ViT would give: the ViT here was fine-tuned for saliency, which left little of the classes in it, and
  its cards are of 200 images, at most four of a class, so that no nine have five of one class. What is left to read of
  *patches* is FVU, dead latents and Moran's I.
"""


def case_of(case: Path) -> str:
    """The tables of one case."""
    cards, oods = (read(sorted(case.glob(f"*/{kind}/results.json"))) for kind in KINDS)
    about = (cards or oods)[0]
    site = about["site"] if isinstance(about["site"], str) else about["site"]["image"]
    seeds = max(len(cards), len(oods))
    lines = [f"{site}; {seeds} seed{'s' * (seeds > 1)}.", ""]
    if cards:
        n = ", ".join(f"{k} {v:,}" for k, v in cards[0].get("images", {}).items())
        lines += [f"Images of the cards: {n}.", ""] if n else []
    figures = over_seeds(r["rows"] for r in cards)
    for head in dict.fromkeys(k[0] for k in figures):
        lines += [f"`{head}`:", "", table(figures, head), ""]
    if oods:
        n = ", ".join(f"{k} {v:,}" for k, v in oods[0]["images"].items())
        fitted = ", ".join(f"{k} {v if v is None else f'{v:,}'}" for k, v in oods[0]["fitted_on"].items())
        lines += [f"OOD, AUROC. Images: {n}. Fitted on: {fitted}.", ""]
        auroc = [[r for r in o["rows"] if "auroc" in r] for o in oods]
        lines += [table(over_seeds(auroc), "ood"), ""]
    return "\n".join(lines)


def cases_in(page: str) -> dict[str, str]:
    """``{case: its tables}`` of a page that was written before."""
    parts = re.split(r"^## (.+)$", page, flags=re.M)[1:]
    return {name: text.strip("\n") + "\n" for name, text in zip(parts[::2], parts[1::2], strict=True) if name != SHORT}


def _seeds(text: str) -> str:
    """How many seeds the tables of a case are of, as they say; of one alone only intervals tell figures apart."""
    found = re.search(r"; (\d+ seeds?)\.", text)
    n = found[1] if found else "seeds not said"
    return f"{n} alone: what has no interval stands as it is" if n == "1 seed" else n


def write_report(runs: Path, path: Path) -> Path:
    """``path`` from the cards and OOD results of all cases and seeds under ``runs``.

    Cases of the page that were not run here stay as they are.
    """
    cases = cases_in(path.read_text(encoding="utf-8")) if path.exists() else {}
    done = {f.parents[2] for kind in KINDS for f in runs.glob(f"*/*/{kind}/results.json")}
    cases |= {f.name: case_of(f) for f in sorted(done)}
    said = [
        f"**{name}** ({ABOUT.get(name, name)}; {_seeds(text)}):\n\n"
        + "".join(f"- {line}\n" for line in findings(read_tables(text)))
        for name, text in sorted(cases.items())
    ]
    parts = [INTRO, f"## {SHORT}\n\n" + "\n".join([*said, LIMITS])]
    parts += [f"## {name}\n\n{text.strip()}\n" for name, text in sorted(cases.items())]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(parts), encoding="utf-8")
    return path
