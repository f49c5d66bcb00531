"""The demo's benchmark card: a quick run of the world's suite on PairedTopK, and the section that links it."""

from __future__ import annotations

from pathlib import Path

from markupsafe import Markup

from mmsae.interpret import Fact, Section
from mmsae.interpret.evaluate import evaluate, read_card

SUITE, FOLDER = "configs/eval/world.yaml", "evaluation"
HEADS = ["core", "recovered", "monosemantic", "unique", "pairs", "stable", "probes", "ontology"]


def make_card(root: Path, seed: int) -> str:
    """``mmsae evaluate --quick`` of the heads that take seconds; probes under shift and OOD detection are left out."""
    sae = str(root / "paired_topk" / "sae")
    return evaluate(sae, SUITE, str(root / FOLDER), root=str(root), heads=HEADS, quick=True, seed=seed, progress=False)


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
        "benchmark card of PairedTopK</a>, a quick run of <code>mmsae evaluate</code> on at most 1,500 pictures a set. "
        "The whole suite, with probes under shift and OOD detection, takes about two minutes: <code>mmsae evaluate "
        "--sae {1}/paired_topk/sae --suite configs/eval/world.yaml --root {1} --out {1}/card</code>.</p>"
    ).format(FOLDER, root)
    return Section("Benchmark card", text, facts=facts)
