"""The page of ``mmsae score``: the table with its controls, and twenty latents, the best and the middle ones."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmsae.interpret.scores.subjects import Subjects
from mmsae.interpret.scores.table import CONTROLS, ScoreRows
from mmsae.interpret.shown import ItemViews
from mmsae.report.gallery import Card, Gallery, Thumbnail
from mmsae.report.page import Fact, Section, Table, render_report
from mmsae.types import IMAGE

PAGE = "report.html"
SHOWN = 10  # latents of each kind
EACH = 8  # items of a latent


def _uri(image: bytes) -> str:
    kind = "webp" if image[:4] == b"RIFF" else "png" if image[:4] == b"\x89PNG" else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


def _card(s: Subjects, row: int, rows: ScoreRows) -> Card:
    latent, name = int(s.latents[row]), s.names.phrases[row]
    own = rows.rows((rows.latent == latent) & (rows.control == s.control) & (rows.modality == s.modality))
    facts = [
        (n.replace("_", " "), f"{v:.2f} [{a:.2f}, {b:.2f}]")
        for n, v, a, b in zip(own.scorer, own.value, own.low, own.high, strict=True)
        if not np.isnan(v)
    ]
    items, views, images, captions = s.positive[row], ItemViews(s.ev, s.modality), [], []
    for i in items[items >= 0][:EACH].tolist():
        caption, data = s.ev.items.caption[i], s.ev.thumbnail(i) if s.modality == IMAGE else None
        if data is not None:
            marked = views.marked(i, latent)[1] if views.places else None
            images.append(Thumbnail(_uri(marked or data), caption or s.ev.items.key[i]))
        elif caption and caption not in [c for c, _ in captions]:
            captions.append((caption, float("nan")))
    return Card(latent, name if s.names.held[row] else f"({name}?)", facts, images, captions)


def chosen(s: Subjects, rows: ScoreRows, scorer: str) -> dict[str, list[int]]:
    """``{kind: rows of the subjects}``: the best by a scorer, and those around the median; named ones where any is."""
    own = rows.rows((rows.control == s.control) & (rows.modality == s.modality) & (rows.scorer == scorer))
    value = dict(zip(own.latent.tolist(), own.value.tolist(), strict=True))
    score = np.array([value.get(j, np.nan) for j in s.latents.tolist()])
    can = ~np.isnan(score) & (s.names.held if s.names.held.any() else True)
    order = np.flatnonzero(can)[np.argsort(-score[can], kind="stable")]
    middle = max(0, len(order) // 2 - SHOWN // 2)
    return {"best": order[:SHOWN].tolist(), "middle": order[middle : middle + SHOWN].tolist()}


def write_report(folder: Path, rows: ScoreRows, found: dict[str, Any], subjects: Sequence[Subjects]) -> Path:
    """Write ``report.html`` into a folder of scores."""
    s, scorer = subjects[0], str(rows.scorer[0])
    named = int(s.names.held.sum())
    columns = ["scorer", "of", "by", "latents", "mean", "low", "high", "chance", "above chance", "outcomes", "missing"]
    tables = []
    for which, title in (("named", "Latents whose name holds"), ("all", "All latents, with their best guess")):
        cells = [
            [r["scorer"].replace("_", " "), CONTROLS[r["control"]], f"{r['modality']}s", r["latents"], r["mean"],
             r["low"], r["high"], r["chance"], r["above"], r["outcomes"], r["missing"]]
            for r in found["summary"] if r["which"] == which
        ]  # fmt: skip
        if cells:
            tables.append(Table(columns, cells, title))
    text = (
        "Means over latents on unseen items, with the interval that a bootstrap over latents gives. *Above chance* is"
        " the share of latents whose own interval of 95 % lies above chance, *outcomes* the median number that a"
        " latent's score rests on. The controls are the same scorers on names that belong to other latents, on items"
        " that were dealt to latents at random where a scorer shows no name, and on the latents of an SAE of random"
        " weights with the best names that were found for them."
    )
    sections = [
        Section(
            "Scores", text, tables=tables, warnings=found["notes"],
            facts=[Fact("latents scored", len(s.latents), f"of {s.ev.d_sae:,}"), Fact("with a name that holds", named),
                   *_account(found)],
        )
    ]  # fmt: skip
    for kind, at in chosen(s, rows, scorer).items():
        title = f"The best by {scorer.replace('_', ' ')}" if kind == "best" else "Around the median"
        if at:
            sections.append(Section(title, "", galleries=[Gallery([_card(s, r, rows) for r in at])]))
    random = next((t for t in subjects if t.control == "random"), None)
    if random is not None:
        at = chosen(random, rows, scorer)["best"][: SHOWN // 2]
        sections.append(
            Section("The best of random weights", "", galleries=[Gallery([_card(random, r, rows) for r in at])])
        )
    lead = "How well names of latents tell what they fire on. In brackets: guesses that did not hold."
    meta = {"negatives": found["job"]["negatives"], "half": "test", "seed": found["job"]["seed"]}
    return render_report(folder / PAGE, "Scores of names", sections, lead=lead, meta=meta, data=found)


def _account(found: dict[str, Any]) -> list[Fact]:
    a = found.get("account")
    if a is None:
        return []
    failed = f"{a['failed']} without an answer, {a['nonsense']} that cannot be read"
    return [Fact("questions", a["new"] + a["cached"], f"{a['cached']} kept from before; {failed}"),
            Fact("tokens", a["tokens_in"] + a["tokens_out"], f"cost {a['cost']:.2f}")]  # fmt: skip
