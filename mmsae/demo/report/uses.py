"""Sections of the demo's page about what the SAEs were used for: filtering a damaged set, and a LLaVA's answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmsae.metrics.pairs.modality import CLASSES
from mmsae.report import Fact, Section, Table, bar_chart, thumbnail
from mmsae.report.gallery import Bar, CodePair

SCORES = {
    "clip": "CLIP cosine",
    "clip_centred": "CLIP cosine, centred",
    "pair_code": "codes",
    "pair_weighted": "weighted codes",
}
DECODING = {
    "greedy": "greedy: the model alone",
    "beta": "beta: sampling above β, the control",
    "concept": "concept: concept decoding",
}
BARS = 6  # reasons shown of a pair
LEAST_LOSS = 0.2  # nats that zeroed states must cost, or there is nothing to recover


def filter_section(out: Path, results: dict[str, Any]) -> list[Section]:
    """What was dropped from the damaged set, with figures, and pairs with the reasons."""
    from mmsae.shards import FaultLog, expand, read_shard

    r = results["filter"]
    share, named = r["damaged_share"], r["reason_named"]
    facts = [
        Fact("damaged before", share["before"], f"{r['samples']:,} samples"),
        Fact("damaged among the kept", share["kept"], f"{r['kept']:,} kept; 0 is best"),
        Fact("swapped captions dropped", r["dropped_share"]["swap"], f"of {r['damaged']['swap']}"),
        Fact("wrong words dropped", r["dropped_share"]["attribute"], f"of {r['damaged']['attribute']}"),
        Fact("reason names the word", named["share"], f"in the first three, of {named['of']} dropped"),
    ]
    table = Table(
        ["score", "swapped caption", "one wrong attribute"],
        [[label, *(r["auroc"][k][s] for k in ("swap", "attribute"))] for s, label in SCORES.items()],
        "AUROC of right against damaged captions in this set, .5 is chance",
    )
    intro = """
A new set of pairs was written in which 15% of the captions belong to another image and 15% have one wrong word, and
`mmsae filter` kept 70% of it by the weighted cosine of PairedTopK's codes. Weights were fitted on the damaged set
itself: nobody said which pairs are right. Everything else about it is in `filter/report.html`.
"""
    wanted = {e["uid"] for some in r["examples"].values() for e in some}
    images = {
        s.uid: s.image for path in expand(str(out / "damaged")) for s in read_shard(path, FaultLog()) if s.uid in wanted
    }
    pairs = [_reasons(title, e, images[e["uid"]], r["score"]) for title, some in r["examples"].items() for e in some]
    how = (
        "Bars to the left are concepts that only the image has, to the right those that only the text has, strongest "
        "first. Names come from the truth of the world where a latent is one of its concepts, else from top captions."
    )
    return [
        Section("Filtering a damaged set", intro, facts=facts, tables=[table]),
        Section("What was dropped, what was kept, and why", how, pairs=pairs),
    ]


def _reasons(title: str, e: dict[str, Any], image: Any, score: str) -> CodePair:
    bars = [Bar(name, 0.0, x, 0.0, x, False) for name, x in zip(e["text_only"], e["text_only_strengths"], strict=True)]
    bars += [
        Bar(name, x, 0.0, x, 0.0, False) for name, x in zip(e["image_only"], e["image_only_strengths"], strict=True)
    ]
    bars = sorted(bars, key=lambda b: -max(b.image, b.text))[:BARS]
    top = max((max(b.image, b.text) for b in bars), default=1.0) or 1.0
    bars = [b._replace(image=b.image / top, text=b.text / top) for b in bars]
    caption = e["caption"] + (f" — in truth: {e['truth']}" if e["truth"] else "")
    return CodePair(title, thumbnail(image, f"image: {title}", size=160), caption, e[score], bars)


def llava_sections(results: dict[str, Any]) -> list[Section]:
    """The tiny LLaVA: its tokens' SAE, cross-modal weights, and hallucination with and without concept decoding."""
    r = results["hallucination"]
    v, ce, w = r["token_sae"], r["ce_recovered"], r["weights"]
    tokens = Table(
        ["tokens", "FVU", "L0", "dead"],
        [[m, *(v[f"{name}/{m}"] for name in ("fvu", "l0", "dead"))] for m in ("image", "text")],
        "One SAE on image and text tokens after the second of three layers, held-out conversations",
    )
    recovered = Table(
        ["prompt", "as it is", "reconstructed", "zeroed", "recovered"],
        [
            [
                label,
                *(ce[k][c] for c in ("original", "reconstructed", "zeroed")),
                ce[k]["recovered"] if ce[k]["zeroed"] - ce[k]["original"] > LEAST_LOSS else None,
            ]
            for k, label in (("image_text", "image and text"), ("text", "text alone"))
        ],
        "Cross-entropy of the text, nats per token, with the states of that layer replaced",
    )
    latents = Table(
        ["latent", "cross-modal weight", "class", "strongest words", "fires on image tokens", "on text tokens"],
        [
            [f"#{a['latent']}", a["weight"], CLASSES[a["class"]], ", ".join(a["words"]), a["image"], a["text"]]
            for a in r["latents"]
        ],
        f"The largest cross-modal weights; {w['weighted']:,} latents have one ({w['coverage']:.0%} of those that fire)",
    )
    intro = """
The same world also teaches a tiny LLaVA: the CLIP's frozen image trunk, a projector and a three-layer language model
that answers yes/no questions and describes images. One SAE was trained on its image and text tokens, streamed from
conversations. A latent's **cross-modal weight** is the mean cosine between the states of the text tokens and of the
image tokens on which it fires most. The model was taught with images only, so without one it knows little that
reconstruction could lose: no share is given where zeroed states cost next to nothing.
"""
    columns = ("accuracy", "precision", "recall", "f1", "yes_ratio")
    rows = [[kind, DECODING[m], *(f[c] for c in columns)] for kind, own in r["pope"].items() for m, f in own.items()]
    pope = Table(["absent objects", "decoding", *columns], rows, "Yes/no questions about held-out images, half true")
    chart = bar_chart(
        {m: {k: own[m]["accuracy"] for k, own in r["pope"].items()} for m in DECODING},
        y_label="accuracy",
        caption="By kind of absent object: any, or near misses of colour or shape; .5 is chance",
    )
    n = next(iter(r["pope"].values()))["greedy"]["n"]
    about = f"""
Objects that are not there were drawn at random, or as near misses (*adversarial*): right in colour or in shape. Concept
decoding moves the text states towards what the image's concepts say and mixes both predictions; the control only
drops tokens that are less than β times as likely as the best, as concept decoding does too. What it gains over that
control is what the concepts gave. With {n} questions a kind, differences below {2 * (0.25 / n) ** 0.5:.2f} are noise.
"""
    return [
        Section("A vision-language model", intro, tables=[tokens, recovered, latents]),
        Section("Does it see what it says?", about, [chart], [pope]),
    ]
