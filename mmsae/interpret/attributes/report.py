"""The page of ``mmsae attributes``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mmsae.interpret.attributes.job import DIRECTION, FEATURE, NONE, RANDOM, Discovered, Way
from mmsae.report.gallery import Card, Gallery, thumbnail
from mmsae.report.page import Fact, Section, Table, render_report
from mmsae.steering.methods.attributes import Attribute

PAGE = "report.html"


def write_report(folder: Path, found: Discovered, images: Mapping[Way, Tensor]) -> Path:
    """Write ``report.html``; ``images`` are ``(n, 3, H, W) uint8``, unsteered and under each feature."""
    rates = found.rates()
    of = {name: f"{r['confirmed']} of {r['asked']}" for name, r in rates.items()}
    facts = [
        Fact("features with a confirmed word", of["features"], _interval(rates["features"])),
        Fact("random directions with one", of["directions"], _interval(rates["directions"])),
    ]
    text = (
        "Words that images move towards when a feature is added: more than towards the other words, and more than under"
        " random live features at the same size of change. *Chosen* is the share of pairs of other prompts in which the"
        " steered image is the nearer one to the word; a word is confirmed where its interval over prompts lies above"
        " a half. Random directions are asked about in the same way: what is found of them is found by chance."
    )
    warnings = []
    if rates["directions"]["confirmed"] and rates["features"]["low"] < rates["directions"]["high"]:
        warnings.append("Random directions have confirmed words as well: the intervals of the two shares overlap.")
    tables = [_words(found.features, "Features", "#"), _words(found.directions, "Random directions", "direction "),
              _sizes(found)]  # fmt: skip
    sections = [Section("Words", text, facts=facts, tables=tables, warnings=warnings)]
    cards = [_card(way, found.features[way.latent], images[Way(NONE)], own)
             for way, own in images.items() if way.kind == FEATURE and found.features[way.latent]]  # fmt: skip
    if cards:
        intro = "A pair is a prompt and a noise, without and with the feature; the prompts had no part in finding it."
        sections.append(Section("Before and after", intro, galleries=[Gallery(cards)]))
    return render_report(folder / PAGE, "Attributes of features", sections, data=rates)


def _interval(rate: Mapping[str, Any]) -> str:
    return "" if rate["low"] is None else f"{rate['low']:.0%} to {rate['high']:.0%}"


def _words(found: Mapping[int, list[Attribute]], title: str, before: str) -> Table:
    columns = ["feature", "word", "gain", "z among words", "z among random", "chosen", "low", "high"]
    rows = [
        [f"{before}{j}", a.word, a.gain, a.z_words, a.z_random, *(a.choice[:3] if a.choice else (None,) * 3)]
        for j, words in found.items() for a in words
    ]  # fmt: skip
    silent = sum(not words for words in found.values())
    return Table(columns, rows or [["none"] + [None] * 7], f"{title}; {silent} of {len(found)} set no word")


def _sizes(found: Discovered) -> Table:
    """How far rows moved, and what was kept of the images."""
    kinds = {FEATURE: "features", RANDOM: "random live features", DIRECTION: "random directions"}
    rows = []
    for kind, name in kinds.items():
        own = [w for w in found.kept if w.kind == kind]
        mean = [sum(of[w] for w in own) / len(own) if own else None for of in (found.relative, found.kept)]
        rows.append([name, len(own), *mean])
    return Table(["what was added", "number", "|dx|/|x|", "cosine of images before and after"], rows,
                 "The same size of change for all")  # fmt: skip


def _card(way: Way, words: list[Attribute], before: Tensor, after: Tensor) -> Card:
    said = {True: "", False: ", not confirmed"}
    facts = [(a.word, f"chosen {a.choice.mean:.2f}{said[a.confirmed]}") for a in words if a.choice]
    pairs = zip(before, after, strict=True)
    images = [thumbnail(x.float() / 255, which, photo=True)
              for pair in pairs for x, which in zip(pair, ("without", "with"), strict=True)]  # fmt: skip
    return Card(way.latent, ", ".join(a.word for a in words if a.confirmed), facts[:6], images, [])
