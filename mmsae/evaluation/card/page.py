"""The page of an evaluation: one section per head, every figure beside its controls, what does not apply at the end."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmsae.evaluation.rows import find
from mmsae.report.figures import GREY, PALETTE, Figure, bar_chart, canvas, figure
from mmsae.report.page import Fact, Section, Table, render_report
from mmsae.report.tables import markdown_table

TITLES = {
    "core": "Reconstruction and sparsity",
    "error": "What is in the error",
    "recovered": "Loss recovered in zero-shot classification",
    "zeroshot": "Zero-shot classification",
    "monosemanticity": "Monosemanticity",
    "uniqueness": "Uniqueness and coherence",
    "top images": "Top images",
    "pairs": "Images and texts",
    "stability": "Stability",
    "probes": "Sparse probing",
    "ontology": "Ontology",
    "absorption": "Absorption",
    "TPP": "Targeted probe perturbation",
    "generalisation": "Generalisation under shift",
    "ood": "OOD detection",
}
INTRO = {
    "core": "FVU is the share of variance that reconstructions miss; the norm ratio is `|x_hat| / |x|`. A latent is "
    "dense where it fires on more than a tenth of the rows: images, at token sites tokens.",
    "error": "`predictable`: share of the error's variance that a linear map of the activation predicts, fitted on "
    "training images; what it leaves is the nonlinear FVU. `shrinkage`: share that a multiple of the activation alone "
    "predicts. `predictable, rescaled`: of the error at the best scale of the reconstruction. `norm predictable`: R^2 "
    "of the error's squared norm.",
    "recovered": "`recovered zero` is 1 where the host's cross-entropy is kept and 0 where it is as bad as with zeros; "
    "`recovered mean` the same against the mean embedding, `recovered kl` by the divergence of the predictions.",
    "monosemanticity": "The mean cosine of pairs of images by the judge, weighted by how strongly a feature answers to "
    "both, each feature's activations scaled to 0..1. That scaling gives nearly every image a weight in raw channels, "
    "which depresses them by construction; features that answer to one image, or to all alike, have no score.",
    "uniqueness": "Jaccard index of the top images of two features (lower: more unique), share of pairs above .5, and "
    "mean cosine of a feature's top images by the judge.",
    "pairs": "A latent belongs to images or texts where more than 95% of its energy lies there. Lift: how much more "
    "often image and text of one pair both fire it than if captions were shuffled. Bridge mass: `z_image z_text` over "
    "pairs times the cosine of the two atoms.",
    "stability": "Mean cosine of atoms with those of another SAE, matched one to one (Hungarian); the control is "
    "random directions of the same number.",
    "probes": "Logistic regression on the few features whose means differ most between images with and without a "
    "concept.",
    "ontology": "A feature stands for the classes on at least half of whose images it fires above a tenth of its "
    "maximum. LCH height: how far above the classes their lowest common ancestor lies; it says something only where it "
    "is below that of the same sets with the classes exchanged at random (null).",
    "absorption": "A probe reads a node of the tree; its main features are those of its k-sparse probe. Absorption: "
    "share of the probe's projection that up to three other features carry in their place; full absorption: share of "
    "images on which the main ones are silent and another carries it (SAEBench, adapted to trees of classes).",
    "TPP": "The n features with the largest effect on a concept's probe are set to 0, the reconstruction error kept.",
    "generalisation": "Probes learn on source images and see no target. *Gain*: target accuracy minus that of the same "
    "probe on raw features, over the same images. *Effective robustness*: target accuracy minus what source accuracy "
    "predicts by the line through raw-feature probes. *Matched gain*: the same at the highest source "
    "accuracy that both reach, over all linear probes.",
}
BEST = dict.fromkeys(("fvu", "LCH height", "inter_sym", "absorption", "full absorption"), "min")
RATES = {
    "fpr95_ood_positive": "FPR95, OOD positive (share of ID flagged where 95% of OOD are)",
    "fpr95_id_positive": "FPR95, ID positive (share of OOD accepted where 95% of ID are)",
}
BARS = {"probes": ("1-sparse", "One feature per concept; .5 is chance"), "zeroshot": ("top1", "Top-1 accuracy")}
NOT_BETTER = ("L0", "dense share", "n", "zero", "mean", "norm ratio", "bias ratio")


def features_of(r: Mapping[str, Any]) -> str:
    """``code``, ``code (random)``."""
    return f"{r['features']} ({r['control']})" if r["control"] else str(r["features"])


def cell(r: Mapping[str, Any]) -> str | float | None:
    """A figure with its interval, and with what it is to be compared."""
    value = r["value"]
    if value is None:
        return None
    text = f"{value:.3f}" if abs(value) < 100 else f"{value:,.0f}"
    low, high = r.get("low"), r.get("high")
    if low is not None and high is not None and low == low:
        text += f" [{round(low, 3) + 0.0:.3f}, {round(high, 3) + 0.0:.3f}]"  # no -0.000
    if r.get("null") is not None and r.get("null") == r.get("null"):
        text += f"; null {r['null']:.3f}"
    if r.get("p") is not None:
        text += f", p {r['p']:.3f}"
    return text


def tables_of(rows: Sequence[Mapping[str, Any]], most: int = 6) -> list[Table]:
    """Tables of one head: per set, features in rows and scores in columns, at most ``most`` scores side by side."""
    out = []
    for name in dict.fromkeys(r["set"] for r in rows):
        own = [r for r in rows if r["set"] == name]
        scores = list(dict.fromkeys(r["score"] for r in own))
        for lo in range(0, len(scores), most):
            some = scores[lo : lo + most]
            part = [r for r in own if r["score"] in some]
            sizes = {r["n"] for r in part}
            cells = {
                (features_of(r), r["score"]): cell(r) if len(sizes) == 1 else f"{cell(r)} (n {r['n']:,})"
                for r in part
                if r["value"] is not None
            }
            body = [[f, *(cells.get((f, s)) for s in some)] for f in dict.fromkeys(map(features_of, part))]
            of = f", n {sizes.pop():,}" if len(sizes) == 1 else ""
            out.append(Table(["features", *some], body, f"{name}{of}; in brackets 95% intervals"))
    return out


def ood_tables(rows: Sequence[Mapping[str, Any]]) -> list[Table]:
    """Tables of AUROC, then of both rates at 95%, by their names."""
    rows = [r for r in rows if r.get("sets") != 1]  # the mean of one set is that set
    own = [r for r in rows if "auroc" in r]
    out = tables_of([r for r in rows if "auroc" not in r])
    out += [t._replace(caption=f"AUROC, {t.caption}") for t in tables_of(own, 7)]
    for field, text in RATES.items():
        some = [{**r, "value": r[field], "low": None, "high": None} for r in own]
        out += [t._replace(caption=f"{text}, {t.caption.split(';')[0]}") for t in tables_of(some, 7)]
    return out


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The tables of all heads, for documents."""
    out = []
    for name in dict.fromkeys(r["head"] for r in rows):
        out.append(f"## {TITLES.get(name, name)}\n")
        own = [r for r in rows if r["head"] == name]
        for table in ood_tables(own) if name == "ood" else tables_of(own):
            out.append(f"{table.caption}:\n\n{markdown_table(table.columns, table.rows, none='')}\n")
    return "\n".join(out)


def scatter(more: Mapping[str, Any], name: str) -> Figure:
    """Target over source accuracy of all probes on a target, with the raw-feature line."""
    with canvas(width=6.4, height=3.8) as (fig, ax):
        for i, (space, found) in enumerate(more["spaces"].items()):
            path = sorted((s, t[name]) for s, t in found["path"])
            colour = PALETTE[i % len(PALETTE)]
            ax.plot(*zip(*path, strict=True), ".-", ms=4, lw=0.8, color=colour, label=space)
            for _, s, t in found["points"]:
                ax.plot(s, t[name], "x", ms=5, color=colour)
        if name in more["lines"]:
            slope, intercept = more["lines"][name]
            low, high = ax.get_xlim()
            grid = [max(1e-3, low) + (min(0.999, high) - max(1e-3, low)) * i / 60 for i in range(61)]
            line = [1 / (1 + math.exp(-(slope * math.log(p / (1 - p)) + intercept))) for p in grid]
            ax.plot(grid, line, "--", lw=1, color=GREY, label="line of raw features")
        ax.set(xlabel="source accuracy", ylabel=f"accuracy on {name}")
        fig.legend(loc="outside right upper")
        text = (
            f"{name}: every dot is a linear probe (L2 strengths, fractions of the training set), crosses other probes"
        )
        return figure(fig, f"accuracy on {name} over source accuracy", text)


def _lines(series: Mapping[str, Sequence[float]], x: str, y: str, caption: str) -> Figure:
    with canvas(width=6.4, height=3.2) as (fig, ax):
        for i, (name, values) in enumerate(series.items()):
            if values:
                ax.plot([j / max(1, len(values) - 1) for j in range(len(values))], values, label=name,
                        color=PALETTE[i % len(PALETTE)])  # fmt: skip
        ax.set(xlabel=x, ylabel=y)
        fig.legend(loc="outside right upper")
        return figure(fig, f"{y} over {x}", caption)


def figures_of(name: str, rows: Sequence[Mapping[str, Any]], more: Mapping[str, Any]) -> list[Figure]:
    """The figures of a head."""
    if name == "monosemanticity" and more.get("scores"):
        return [_lines(more["scores"], "share of features", "MS", "Features from the best to the worst")]
    if name == "error":
        return [_error(kind, find(rows, set=kind)) for kind in dict.fromkeys(r["set"] for r in rows)]
    if name == "pairs" and more.get("modality"):
        values = sorted(more["modality"], reverse=True)
        text = "Share of each latent's energy on images, sorted: 1 is an image latent, 0 a text latent"
        return [_lines({"trained": values}, "share of latents", "image share", text)]
    if name == "generalisation":
        return [scatter(more, n) for n in more["lines"]]
    if name == "ontology":
        return [f for tree, spaces in more.items() if (f := _heights(tree, spaces)) is not None]
    if name == "ood":
        return [_roc(n, curves) for n, curves in more.get("roc", {}).items()]
    if name in BARS:
        score, text = BARS[name]
        values = {"accuracy": {features_of(r): r["value"] for r in rows if r["score"] == score and r["value"]}}
        return [bar_chart(values, y_label="accuracy", caption=text)]
    return []


def _error(name: str, rows: Sequence[Mapping[str, Any]]) -> Figure:
    whole, rest = ({features_of(r): r["value"] for r in find(rows, score=s)} for s in ("fvu", "nonlinear fvu"))
    parts = {"nonlinear": rest, "linear": {k: v - rest[k] for k, v in whole.items()}}
    text = f"{name}: the error's two parts, what a linear map of the activation predicts and the rest"
    return bar_chart(parts, y_label="share of variance", caption=text, stacked=True)


def _roc(name: str, curves: Mapping[str, Sequence[Sequence[float]]]) -> Figure:
    with canvas(width=4.6, height=3.4) as (fig, ax):
        for i, (label, (fpr, tpr)) in enumerate(curves.items()):
            ax.plot(fpr, tpr, label=label, color=PALETTE[i % len(PALETTE)])
        ax.plot([0, 1], [0, 1], "--", lw=1, color=GREY)
        ax.set(xlabel="share of ID images flagged", ylabel="share of OOD images flagged")
        ax.legend(loc="lower right")
        return figure(fig, f"ROC on {name}", f"{name}: OOD is the positive class")


def _heights(tree: str, found: Mapping[str, Any]) -> Figure | None:
    have = {k: v["heights"] for k, v in found.items() if sum(v["heights"]) > 0}
    if not have:
        return None
    values = {k: {str(h): n / sum(v) for h, n in enumerate(v) if h} for k, v in have.items()}
    text = f"{tree}: share of features (of two classes or more) by the height of their lowest common ancestor"
    return bar_chart(values, y_label="share of features", caption=text)


def write_card(path: Path, rows: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> Path:
    """Write the page of all figures, with what ``results.json`` holds beside them."""
    by_head = {name: [r for r in rows if r["head"] == name] for name in dict.fromkeys(r["head"] for r in rows)}
    command = {r: h for h, r in COMMAND.items()}
    sections = [_summary(by_head, about)]
    for name, own in by_head.items():
        head = command.get(name, name)
        notes = " ".join(about["notes"].get(head, ()))
        intro = "\n\n".join(filter(None, (INTRO.get(name, ""), notes)))
        tables = ood_tables(own) if name == "ood" else tables_of(own)
        sections.append(
            Section(TITLES.get(name, name), intro, figures_of(name, own, about["more"].get(head, {})), tables)
        )
    if about["skipped"]:
        table = Table(["head", "why"], [[k, v] for k, v in about["skipped"].items()])
        sections.append(Section("What does not apply", tables=[table]))
    lead = (
        "Every figure stands beside its controls: the same SAE with **random** weights, as many principal components "
        "(**pca**) as the code has active latents, whitened embeddings. A figure that does not beat them says nothing "
        "about the SAE."
    )
    if about.get("controls"):
        lead += f" Trained controls, coded and scored in the SAE's place: **{'**, **'.join(about['controls'])}**."
    meta = {"SAE": about["sae"], "host": about["host"], "suite": about["suite"], "latents": f"{about['d_sae']:,}"}
    meta |= {"images": ", ".join(f"{k} {v:,}" for k, v in about["images"].items()), "seed": about["seed"]}
    if about["quick"]:
        meta["quick"] = "fewer images and probes: figures are rough"
    data = {k: v for k, v in about.items() if k != "more"} | {"rows": list(rows)}
    return render_report(path, f"Benchmark card: {about['title']}", sections, lead=lead, meta=meta, data=data)


#: ``{head: what its rows are called}`` where these differ.
COMMAND = {
    "monosemantic": "monosemanticity",
    "top_images": "top images",
    "unique": "uniqueness",
    "stable": "stability",
    "shifted": "generalisation",
    "absorbed": "absorption",
    "targeted": "TPP",
}


def _summary(by_head: Mapping[str, Sequence[Mapping[str, Any]]], about: Mapping[str, Any]) -> Section:
    """Where codes gain and where they lose against raw features and random weights, counted over all rows."""
    facts, wins, beside = [], {}, ("random", *about.get("controls", ()))
    for name, own in by_head.items():
        for r in own:
            if r["features"] != "code" or r["control"] or r["value"] is None or r["score"] in NOT_BETTER:
                continue
            if re.search("gain|effective|share|latents|bridge|energy in", r["score"]):
                continue
            if name == "ood" and r["set"] in ("near", "far"):  # means of sets that are counted already
                continue
            same = [o for o in own if (o["set"], o["score"]) == (r["set"], r["score"]) and o["value"] is not None]
            for against, match in (("raw", ("raw", "")), *((c, ("code", c)) for c in beside)):
                other = next((o for o in same if (o["features"], o["control"]) == match), None)
                if other is not None:
                    sign = -1 if BEST.get(r["score"]) == "min" or "Jaccard" in r["score"] else 1
                    wins.setdefault((name, against), []).append(sign * (r["value"] - other["value"]) > 0)
    table = [
        [TITLES.get(n, n), *(f"{sum(w)} of {len(w)}" if (w := wins.get((n, a))) else None for a in ("raw", *beside))]
        for n in dict.fromkeys(n for n, _ in wins)
    ]
    core = {(r["score"], r["control"]): r["value"] for r in by_head.get("core", ()) if r["set"] == "test"}
    row = "token" if ("latents per image", "") in core else "image"
    for score, label in (("fvu", "FVU"), ("L0", f"latents per {row}"), ("dead share", "dead latents")):
        if (score, "") in core:
            other = core.get((score, "random"))
            facts.append(Fact(label, core[score, ""], f"random weights {other:.3f}" if other is not None else ""))
    intro = (
        "How often the code is better than raw features, and than that of random weights (and trained controls), "
        "over all sets and scores."
    )
    tables = [Table(["head", "better than raw", *(f"better than {c}" for c in beside)], table)]
    return Section("In short", intro, facts=facts, warnings=about.get("warnings", ()), tables=tables)
