"""The part of ``mmsae demo`` about images that are unlike the world: digits, noise, and a faint checkerboard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from markupsafe import Markup

from mmsae.demo.stages import SEEDS, fit_recipe
from mmsae.evaluation.card.card import read_card
from mmsae.evaluation.card.command import evaluate
from mmsae.evaluation.options import EvaluationRun, Labelled, OODSets
from mmsae.files import write_json
from mmsae.report import Fact, Section, Table, bar_chart

RESULTS = "ood_results.json"
TARS = 500  # scenes of the ID set for every training shard that the SAE on pooled features learns from
SHOWN = {
    "raw msp": "largest probability",
    "raw mds": "Mahalanobis",
    "raw knn": "nearest neighbours",
    "raw vim": "ViM",
    "resid mds": "Mahalanobis, residual",
    "code mds": "Mahalanobis, codes",
    "codes rarity": "rarity of latents",
    "codes recon": "SAE error",
    "random codes recon": "error of a random SAE",
    "pca codes recon": "error of PCA",
    "statistics pixels mds": "plain image statistics",
}


def detect_ood(root: Path, n: int, steps: int, seed: int, progress: bool = True) -> None:
    """Write the sets, train a TopK on the features before the projection, run ``mmsae ood``.

    Of the ``n`` scenes drawn for the in-distribution set those of one object are kept. ``seed`` is of the SAE and its
    random control.
    """
    from mmsae.activations import extract
    from mmsae.evaluation.ood.command import ood
    from mmsae.shards import expand
    from mmsae.world.generator.ood import FAR, NEAR, write_ood_sets

    sets = write_ood_sets(root / "ood_sets", n, SEEDS["ood"])
    store, run = root / "store" / "pooled", root / "topk_pooled"
    shards = expand(str(root / "shards" / "train"))[: max(1, n // TARS)]
    host = f"local-dir:{root / 'clip'}"
    extract(host, shards, store, sites="image.pooled", workers=0, progress=progress)
    fit_recipe("topk_pooled", run, steps, seed, progress, ["--data.store", str(store)])
    done = ood(
        str(run / "sae"), sets["id"], [f"{name}={sets[name]}" for name in (*FAR, *NEAR)], str(root / "ood"), host=host,
        seed=seed, beside=OODSets(near=NEAR), images=Labelled("class"), run=EvaluationRun("cpu", progress=False),
    )  # fmt: skip
    write_json(root / RESULTS, figures(done["rows"]) | {"notes": done["notes"]})


def figures(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """``{figure: {detector: {set: value}}, images: {set: n}}``; a detector of a control begins with its name."""
    out: dict[str, Any] = {"auroc": {}, "fpr95_ood_positive": {}, "images": {}}
    for r in (r for r in rows if "auroc" in r):
        name = " ".join(filter(None, (r["control"], r["features"], r["score"])))
        for figure in ("auroc", "fpr95_ood_positive"):
            out[figure].setdefault(name, {})[r["set"]] = r[figure]
        out["images"] |= {"id": r["n_id"], r["set"]: r["n_ood"]}
    return out


def ood_section(results: dict[str, Any]) -> Section:
    """Table and chart of the main detectors; all of them are in ``ood/tables.md``."""
    r = results["ood"]
    sets = [s for s in next(iter(r["auroc"].values())) if s not in ("near", "far")]
    rows = [
        [label, *(r["auroc"][name][s] for s in sets), *(r["fpr95_ood_positive"][name][s] for s in sets)]
        for name, label in SHOWN.items()
        if name in r["auroc"]
    ]
    counts = ", ".join(f"{r['images'][s]:,} {s}" for s in sets)
    table = Table(
        ["detector", *sets, *(f"{s}, FPR95" for s in sets)], rows,
        f"AUROC of {r['images']['id']:,} new scenes against {counts}; and "
        "the share of scenes that is flagged when 95% of the others are", dict.fromkeys(sets, "max"),
    )  # fmt: skip
    bars = {label: dict(zip(sets, row[1 : 1 + len(sets)], strict=True)) for label, row in _labelled(rows).items()}
    chart = bar_chart(bars, y_label="AUROC", lines={"chance": 0.5})
    intro = """
Handwritten digits and noise were never seen by the CLIP, and a faint checkerboard over scenes of the world is nearly
the world. Detectors read the features before the projection; an SAE was trained on them, from images of the world
alone. Settings were chosen on scrambled and noisy versions of other scenes. The last three rows are controls: without
them one might take for understanding what a mean and a covariance can do. All detectors, with intervals and both
conventions of FPR95, are in `ood/tables.md` and `ood/results.json`.
"""
    return Section("Images from elsewhere", intro, [chart], [table])


def _labelled(rows: list[list[Any]]) -> dict[str, list[Any]]:
    """The rows that the chart shows, by their label."""
    shown = ("raw mds", "raw knn", "codes recon", "random codes recon", "pca codes recon")
    return {r[0]: r for r in rows if r[0] in {SHOWN[s] for s in shown}}


SUITE, FOLDER = "configs/eval/world.yaml", "evaluation"
HEADS = ["core", "recovered", "monosemantic", "unique", "pairs", "stable", "probes", "ontology"]


def make_card(root: Path, seed: int) -> str:
    """``mmsae evaluate --quick`` of the heads that take seconds; probes under shift and OOD detection are left out."""
    sae = str(root / "paired_topk" / "sae")
    run, out = EvaluationRun(progress=False), str(root / FOLDER)
    return evaluate(sae, SUITE, out, root=str(root), heads=HEADS, quick=True, seed=seed, run=run)


def card_section(root: Path) -> Section:
    """A few figures of the card beside their controls, and the link."""
    rows = {(r["head"], r["score"], r["features"], r["control"]): r for r in read_card(root / FOLDER)["rows"]}
    shown = {
        "one latent tells a concept, accuracy": ("probes", "1-sparse"),
        "monosemanticity": ("monosemanticity", "MS"),
    }
    facts = []
    for label, (head, score) in shown.items():
        value, raw, random = (
            rows[head, score, f, c]["value"] for f, c in (("code", ""), ("raw", ""), ("code", "random"))
        )
        facts.append(Fact(label, value, f"raw features {raw:.3f}, random weights {random:.3f}"))
    text = Markup(
        '<p>Every measure of the literature that applies, each beside its controls: <a href="{0}/report.html">the '
        "benchmark card of PairedTopK</a>, a quick run of <code>mmsae evaluate</code> on at most 1,500 images a set. "
        "The whole suite, with probes under shift and OOD detection, takes about two minutes: <code>mmsae evaluate "
        "--sae {1}/paired_topk/sae --suite configs/eval/world.yaml --root {1} --out {1}/card</code>.</p>"
    ).format(FOLDER, root)
    return Section("Benchmark card", text, facts=facts)
