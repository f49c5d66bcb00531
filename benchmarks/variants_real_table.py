"""The tables and the picture of variants_real.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.ticker import NullFormatter

from mmsae.report.figures import GREY, PALETTE, canvas, write_png
from mmsae.report.tables import markdown_table

COLUMNS = {
    "l0": "L0",
    "fvu": "FVU",
    "fvu_image": "FVU image",
    "fvu_text": "FVU text",
    "dead": "dead",
    "ms": "MS above chance",
    "ms_scored": "latents with MS",
    "ms_text": "MS above chance, text",
    "nearest": "nearest class mean of codes",
    "host": "host on reconstructions",
    "same": "class as without",
    "zero_code": "zero-shot: codes",
    "zero_recon": "reconstructions",
}
TITLES = {"images": "Tiny-ImageNet, maps of EfficientNet-Lite0", "pairs": "CIFAR-10 pairs, embeddings of a small CLIP"}


def cell(row: Mapping[str, Any], name: str) -> str:
    """Mean, and in brackets the standard deviation over seeds."""
    digits = {"l0": 1, "ms": 4}.get(name, 3)
    sd = row.get(f"{name}_sd")
    return f"{row[name]:.{digits}f}" + ("" if sd is None else f" ({sd:.{digits}f})")


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line an SAE and k, those of one k together."""
    shown = [c for c in COLUMNS if c in rows[0]]
    order = sorted(rows, key=lambda r: r["k"])  # stable: variants stay in their order, controls last
    return markdown_table(
        ["SAE", "k", *(COLUMNS[c] for c in shown)],
        [[r["sae"], str(r["k"]), *(cell(r, c) for c in shown)] for r in order],
    )


def choices(found: Mapping[str, Mapping[str, Any]]) -> str:
    """FVU and L0 of everything that was tried, on the rows to choose on."""
    lines = []
    for name, own in found.items():
        tried = ", ".join(f"{float(x):g}: {t['fvu']:.4f} at {t['l0']:.1f}" for x, t in own["tried"].items())
        strengths = {float(s) for s in own["strength"].values()}
        said = (
            f"{own['lr']:g}"
            if strengths == {1.0}
            else f"{own['lr']:g}; strengths " + ", ".join(f"{s:g} for k {k}" for k, s in own["strength"].items())
        )
        lines.append([name, said, tried])
    return markdown_table(["SAE", "chosen", "tried: FVU at L0"], lines)


def markdown(found: Mapping[str, Any]) -> str:
    """All tables."""
    out = []
    for name, part in found["parts"].items():
        size, host = part["size"], ", ".join(f"{k} {v:.3f}" for k, v in part["host"].items())
        seeds = ", ".join(map(str, found["seeds"]))
        out.append(f"## {TITLES[name]}")
        out.append(
            f"{part['rows']:,} rows, F {size['d_sae']}, {size['steps']} steps of {size['rows']} rows, seeds {seeds}. "
            f"Without an SAE: {host}."
        )
        out += [table(part["table"]), "Chosen on other rows, with another seed:", choices(part["choices"])]
    return "\n\n".join(out) + "\n"


def draw(found: Mapping[str, Any], path: Path) -> Path:
    """FVU against L0 of every variant, in a panel for each part; controls are crosses."""
    parts = found["parts"]
    names = list(dict.fromkeys(v for part in parts.values() for v in part["size"]["variants"]))
    colour = dict(zip(names, [*PALETTE, "#84cc16", "#ec4899", "#78350f"], strict=False))
    with canvas(len(parts), width=1.0 + 4.6 * len(parts), height=5.6, squeeze=False) as (fig, axes):
        for ax, (name, part) in zip(axes[0], parts.items(), strict=True):
            for variant in part["size"]["variants"]:
                own = sorted((r for r in part["table"] if r["sae"] == variant), key=lambda r: r["l0"])
                x, y, sd = ([r.get(c, 0) for r in own] for c in ("l0", "fvu", "fvu_sd"))
                ax.errorbar(x, y, sd, fmt="o-", ms=4, lw=1.4, color=colour[variant], label=variant)
            for marker, row in zip("x+12", (r for r in part["table"] if r["control"]), strict=False):
                ax.plot(row["l0"], row["fvu"], marker, color=GREY, ms=7, label=row["sae"])
            ax.set(title=TITLES[name], xlabel="L0: latents per row", ylabel="FVU", xscale="log", yscale="log")
            ax.set_xticks(part["size"]["ks"])
            for axis in (ax.xaxis, ax.yaxis):
                axis.set_major_formatter("{x:g}")
            ax.xaxis.set_minor_formatter(NullFormatter())
            if max(r["fvu"] for r in part["table"]) < 10 * min(r["fvu"] for r in part["table"]):
                ax.yaxis.set_minor_formatter("{x:.1g}")
            ax.legend(fontsize=7.5, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.14))
        return write_png(fig, path, dpi=130, facecolor="white")


def write_report(out: Path, found: Mapping[str, Any]) -> Path:
    """``table.md`` and ``front.png`` in a folder; returns the former."""
    path = out / "table.md"
    path.write_text(markdown(found), encoding="utf-8")
    draw(found, out / "front.png")
    return path
