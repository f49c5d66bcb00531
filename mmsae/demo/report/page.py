"""The page that ``mmsae demo`` ends with: figures, tables, and the concepts themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from markupsafe import Markup

from mmsae.demo.browse import PAGE
from mmsae.demo.curves import read_curves
from mmsae.demo.ood import card_section, ood_section
from mmsae.demo.report.drawing import steering_section
from mmsae.demo.report.uses import filter_section, llava_sections
from mmsae.report import (
    Fact,
    Gallery,
    Section,
    Table,
    bar_chart,
    compare_codes,
    concept_cards,
    line_chart,
    names_of,
    render_report,
    shown_latents,
)
from mmsae.types import IMAGE, TEXT

TITLES = {"paired_topk": "PairedTopK", "vl_sae": "VL-SAE", "shared_topk": "Shared TopK", "random": "random weights"}


def _overview(results: dict[str, Any]) -> Section:
    best, clip = results["methods"]["paired_topk"], results["clip"]
    mismatch = best["mismatch"]["attribute"]["pair_weighted"]
    facts = [
        Fact("variance explained, image", 1 - best["fvu"][IMAGE], "PairedTopK, held-out"),
        Fact("variance explained, text", 1 - best["fvu"][TEXT]),
        Fact("concept F1, one latent for both", best["concept_f1"]["same"], "23 known concepts"),
        Fact("caption found from code, R@1", best["recall_at_1"], f"host {clip['recall_at_1']['image_to_text']:.3f}"),
        Fact("one wrong word found, AUROC", mismatch, f"host {results['mismatch']['attribute']['clip']:.3f}"),
    ]
    intro = """
A world of coloured shapes was generated together with the truth about every image, a small CLIP was trained on its
image-caption pairs, and three sparse autoencoders were trained on that CLIP's embeddings. Because the truth is known,
it can be said which of their latents mean something, and whether they mean the same in images and in words.

Everything here is scored on held-out renders. Latents and thresholds were matched with concepts on training renders.
The last rows are those of an SAE of equal size with **random weights**: without them every number looks good.
"""
    zero = clip["zero_shot"]
    table = Table(
        ["host", *[a.replace("_", " × ") for a in zero], "R@1 image→text", "R@1 text→image"],
        [["tiny CLIP", *zero.values(), *clip["recall_at_1"].values()]],
        "The host itself: zero-shot accuracy by attribute, and retrieval among 1,000 pairs",
    )
    return Section("What was found", intro, facts=facts, tables=[table])


def _methods(results: dict[str, Any]) -> Section:
    methods = results["methods"].items()
    codes = Table(
        ["SAE", "FVU image", "FVU text", "cosine of pairs", "of shuffled pairs", "R@1 from codes", "dead"],
        [
            [TITLES[name], *m["fvu"].values(), *(m["code_cosine"][k] for k in ("pair", "shuffled")), m["recall_at_1"],
             m["dead_fraction"]]
            for name, m in methods
        ],
        "Codes and reconstructions", {"FVU image": "min", "FVU text": "min", "R@1 from codes": "max"},
    )  # fmt: skip
    concepts = Table(
        ["SAE", "F1 image", "F1 text", "F1 same", "AUC same", "strongest latent agrees"],
        [
            [TITLES[name], *(m["concept_f1"][s] for s in (IMAGE, TEXT, "same")), m["concept_auc"]["same"],
             m["top_concept_agreement"]]
            for name, m in methods
        ],
        "The 23 known concepts of scenes with one object",
        dict.fromkeys(("F1 image", "F1 text", "F1 same", "AUC same"), "max"),
    )  # fmt: skip
    intro = """
FVU is the share of variance that the reconstruction leaves unexplained. *Same* asks for one latent that detects the
concept in images **and** in captions, and counts the worse of the two. The cosine of codes means little without that
of shuffled pairs: codes that agree whatever the pair would look perfectly aligned.
"""
    warnings = [f"{TITLES[name]}: {w}" for name, m in results["methods"].items() for w in m["warnings"]]
    groups = {TITLES[n]: m["concept_f1_by_group"]["same"] for n, m in results["methods"].items()}
    chart = bar_chart(groups, y_label="F1, one latent for both modalities", caption="Concepts by group")
    return Section("Four SAEs of equal size", intro, [chart], [codes, concepts], warnings=warnings)


def _curves(out: Path, methods: list[str]) -> Section:
    logs = {TITLES[m]: read_curves(out / m) for m in methods}
    shown = {"fvu/image": "FVU, images", "fvu/text": "FVU, texts", "dead/image": "dead share, images"}
    panels = {
        title: {name: curves[column] for name, curves in logs.items() if column in curves}
        for column, title in shown.items()
    }
    chart = line_chart(panels, x_label="step", caption="Training, every tenth step, on the batch")
    return Section("Training", "The same steps, batches and latents for each.", [chart])


def _uses(results: dict[str, Any]) -> Section:
    damage = Table(
        ["score", "swapped caption", "one wrong attribute"],
        [
            ["CLIP cosine", *(results["mismatch"][k]["clip"] for k in ("swap", "attribute"))],
            ["CLIP cosine, centred", *(results["mismatch"][k]["clip_centred"] for k in ("swap", "attribute"))],
            *(
                [f"{TITLES[n]}, {label}", *(m["mismatch"][k][score] for k in ("swap", "attribute"))]
                for n, m in results["methods"].items()
                for score, label in (("pair_code", "codes"), ("pair_weighted", "weighted codes"))
            ),
        ],
        "Finding captions that do not fit: AUROC of true against damaged pairs, .5 is chance",
    )
    zero = Table(
        ["SAE", "embedding", "reconstruction", "code", "embedding + α code", "α"],
        [
            [TITLES[n], *(m["zero_shot"][k] for k in ("raw", "recon", "code", "enhanced", "alpha"))]
            for n, m in results["methods"].items()
        ],
        "Zero-shot classification into 30 classes of colour and shape; α was chosen on training renders",
    )
    intro = """
No code score beats the plain cosine of a host that was trained on clean pairs: what codes add is the *name* of what is
wrong, below. At α = 0 the enhanced classifier is the plain one, exactly.
"""
    return Section("What it is good for", intro, tables=[damage, zero])


def _examples(out: Path, results: dict[str, Any]) -> list[Section]:
    from mmsae.activations import ActivationStore
    from mmsae.metrics.concepts.evidence import text_keys, top_evidence
    from mmsae.sae import SAE
    from mmsae.shards import FaultLog, expand, read_shard
    from mmsae.world.generator.captions import damage
    from mmsae.world.generator.scene import sample_scenes

    store = ActivationStore(out / "store" / "test")
    uids, captions = list(store.uids), list(store.captions)
    log = FaultLog()
    images = {s.uid: s.image for path in expand(str(out / "shards" / "test")) for s in read_shard(path, log)}
    sae = SAE.from_pretrained(out / "paired_topk" / "sae")
    saved = torch.load(out / "report.pt", weights_only=True)
    names = names_of(results["methods"]["paired_topk"]["concepts"])
    with torch.no_grad():
        codes = {m: sae.encode(store.load(modality=m), m) for m in (IMAGE, TEXT)}
        wrong = sae.encode(saved["damaged"], TEXT)
    keys = text_keys(captions)
    tables = {IMAGE: top_evidence(codes[IMAGE], uids, 8), TEXT: top_evidence(codes[TEXT], uids, 4, keys)}
    latents = shown_latents(tables, saved["correlation"], 24)
    cards = concept_cards(
        latents, tables, images.get, dict(zip(uids, captions, strict=True)), names, saved["correlation"]
    )
    gallery = Section(
        "Concepts",
        "The latents whose image and text codes correlate most. Names come from the truth of the world, where a latent "
        "reaches F1 .6 in both modalities; the images and captions are the held-out ones that it fires on most.",
        galleries=[Gallery(cards)],
    )
    scenes = sample_scenes(len(uids), 2)
    texts, changed = damage(scenes, 3)
    row = next(i for i in range(len(uids)) if not scenes.two[i] and changed[i] == "colour")
    one = slice(row, row + 1)
    pairs = [
        compare_codes(codes[IMAGE].rows(one), c.rows(one), title, text, images[uids[row]], names)
        for title, c, text in (("Matched pair", codes[TEXT], captions[row]), ("Wrong colour", wrong, texts[row]))
    ]
    why = Section(
        "Why a pair does not fit",
        "The codes of one image beside those of its caption, and of the same caption with the wrong colour. Latents "
        "that only one side has say what is wrong.",
        pairs=pairs,
    )
    return [why, gallery]


def write_report(out: Path, results: dict[str, Any]) -> Path:
    """Write ``report.html`` from the folder of a finished demo."""
    trained = [m for m in results["methods"] if m != "random"]
    seconds = results["seconds"]
    timing = Section(
        "Time",
        "The diffusion pipeline has a process of its own beside the stages from `clip` on, the LLaVA one from "
        "`extract_train` on.",
        tables=[
            Table(["stage", "seconds"], [*seconds.items(), ["all", sum(seconds.values())]]),
            Table(["stage of the LLaVA's process", "seconds"], list(results["hallucination"]["seconds"].items())),
            Table(["stage of the pipeline's process", "seconds"], list(results["steering"]["seconds"].items())),
        ],
    )
    sections = [
        _overview(results),
        *_examples(out, results),
        _methods(results),
        _uses(results),
        *filter_section(out, results),
        ood_section(results),
        card_section(out),
        *llava_sections(results),
        steering_section(out, results),
        _curves(out, trained),
        timing,
    ]
    figures = {
        k: v if k != "methods" else {n: {q: w for q, w in m.items() if q != "concepts"} for n, m in v.items()}
        for k, v in results.items()
    }
    return render_report(
        out / "report.html",
        "mmsae demo: one set of concepts for images and words",
        sections,
        lead=Markup('All latents, with what they fire on: <a href="{}">the browser</a>.').format(PAGE),
        meta={"profile": results["profile"], "seed": results["seed"]},
        data=figures,
    )
