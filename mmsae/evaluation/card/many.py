"""``mmsae evaluate --sae FOLDER`` of a folder of SAEs: a card of each, and one table of all with ranks and controls.

Every card is whole or not there, and says of which SAE it is, so that the same command goes on with those that have
none. An SAE that cannot be read or scored is named, and the others are scored all the same.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from mmsae.evaluation.card.card import PAGE, RESULTS, read_card
from mmsae.evaluation.options import PCA, RANDOM
from mmsae.evaluation.rows import TRAINED, write_results
from mmsae.files import atomic_file
from mmsae.jobs.folder import JobFolder
from mmsae.report.page import Section, Table, render_report
from mmsae.report.tables import markdown_table
from mmsae.sae.foreign import MARKS, library_of
from mmsae.types import InputError

CARDS, CACHE, TABLE, MARKDOWN = "cards", "cache", "table.csv", "tables.md"
WEIGHTS = (".safetensors", ".pt", ".pth")


class Headline(NamedTuple):
    """A figure by which SAEs are ranked."""

    head: str  #: As rows name it
    score: str  #: As rows name it
    features: str = "code"  #: Of what
    best: str = "max"  #: ``min`` where less is better
    set: str = ""  #: Name of the set; empty: ``test``, else the first

    @property
    def name(self) -> str:
        """What the column is called."""
        of = f" of {self.features}" if self.features == "recon" and self.head == "probes" else ""
        return self.head if self.score == self.head else f"{self.head}{of}: {self.score}"


HEADLINES = (
    Headline("core", "fvu", "recon", "min"),
    Headline("core", "dead share", best="min"),
    Headline("recovered", "recovered zero", "recon"),
    Headline("zeroshot", "top1"),
    Headline("monosemanticity", "MS above chance"),
    Headline("uniqueness", "share of near copies", best="min"),
    Headline("top images", "share with 5 of one class"),
    Headline("probes", "1-sparse"),
    Headline("probes", "all features", "recon"),
    Headline("stability", "stability", "atoms"),
    Headline("absorption", "absorption", best="min"),
    Headline("ontology", "best F1 of a node"),
    Headline("localised", "Moran's I"),
    Headline("transfer", "composite", set="all"),
    Headline("ood", "recon", "codes", set="far"),
)
"""One or two figures a head; what no card has is no column."""


def sae_folders(root: Path) -> list[Path]:
    """Every SAE below a folder, and every folder of weights that no library is known by, in order of their names."""
    found = []
    for place, below, files in os.walk(root):
        below[:] = sorted(d for d in below if not d.startswith("."))
        here = Path(place)
        if any(fits(here) for fits in MARKS.values()) or any(f.endswith(WEIGHTS) for f in files):
            found.append(here)
            below.clear()
    return found


def is_folder_of_saes(path: str) -> bool:
    """Whether a path is a local folder that is no SAE and has some below it."""
    return Path(path).is_dir() and library_of(path) is None and sae_folders(Path(path)) not in ([], [Path(path)])


class Cards:
    """The cards of a folder of SAEs.

    Args:
        root: The folder of SAEs.
        out: Folder for the cards and the table.
        settings: What identifies the job beside the SAEs, plain JSON values.
        score: ``score(path, folder)`` writes the card of an SAE, unless the card there is of it.
        say: Prints a line.

    Attributes:
        through: Whether every SAE was tried, so that nothing is left to go on with.
    """

    def __init__(
        self, root: Path, out: Path, settings: Mapping[str, Any], score: Callable[[str, Path], None],
        say: Callable[[str], None],
    ):  # fmt: skip
        self.root, self.out, self.score, self.say, self.through = root, out, score, say, False
        own = (CARDS, CACHE, RESULTS, PAGE, TABLE, MARKDOWN)
        self.folder = JobFolder(out, settings, "mmsae evaluate", writes=own, holds="cards")

    def run(self) -> Path:
        """Score every SAE that has no card yet, and write the table; returns the page.

        Raises:
            InputError: Some could not be scored; the table has the others.
        """
        places, failed = sae_folders(self.root), {}
        names = [p.relative_to(self.root).as_posix() for p in places]
        with self.folder.lead():
            for i, (name, place) in enumerate(zip(names, places, strict=True)):
                self.say(f"SAE {i + 1} of {len(places)}: {name}")
                try:
                    self.score(str(place), self.out / CARDS / name)
                except InputError as e:
                    failed[name] = str(e)
                    self.say(f"  not scored: {e}")
            self.through = True
            cards = {n: read_card(self.out / CARDS / n) for n in names if n not in failed}
            if cards:
                self.write(cards, failed)
        if failed:
            name, why = next(iter(failed.items()))
            more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
            rest = f"; the others are in {self.out / PAGE}" if cards else ""
            raise InputError(
                f"{len(failed)} of {len(places)} SAEs in {self.root} could not be scored: {name}: {why}{more}{rest}"
            )
        return self.out / PAGE

    def write(self, cards: Mapping[str, Mapping[str, Any]], failed: Mapping[str, str]) -> None:
        """The table of all as CSV, Markdown and a page, and every row of every card in ``results.json``."""
        lines = table_of(cards)
        with atomic_file(self.out / TABLE) as temp, open(temp, "w", newline="", encoding="utf-8") as f:
            writer = csv.DictWriter(f, list(dict.fromkeys(c for line in lines for c in line)))
            writer.writeheader()
            writer.writerows(lines)
        sections = [Section(title[0].upper() + title[1:], BESIDE.get(title, NOTE), tables=[t])
                    for title, t in shown(lines).items()]  # fmt: skip
        sections[0] = sections[0]._replace(warnings=[f"{n} was not scored: {w}" for n, w in failed.items()])
        with atomic_file(self.out / MARKDOWN) as temp:
            text = [f"{s.title}:\n\n{markdown_table(t.columns, t.rows)}\n" for s in sections for t in s.tables]
            temp.write_text("\n".join(text), encoding="utf-8")
        first = next(iter(cards.values()))
        meta = {"host": first["host"], "suite": first["suite"], "SAEs": len(cards), "not scored": len(failed)}
        lead = f"The card of each SAE is in {CARDS}, by its name."
        render_report(self.out / PAGE, f"SAEs of {self.root.name}: {first['title']}", sections, lead=lead, meta=meta)
        rows = [{"sae": name, **r} for name, card in cards.items() for r in card["rows"]]
        write_results(self.out, rows, {"job": self.folder.job, "table": lines, "failed": dict(failed)})


RANDOMS = "random weights"
BESIDE = {
    RANDOMS: "The same figures of each SAE's composition, size and normaliser with random weights.",
    "raw features": "The same figures of the host's activations; those that are of reconstructions do not exist.",
    "components": "The same figures of as many principal components as each SAE has latents on.",
}
NOTE = (
    "One figure or two of every head that applies, and in brackets the rank among these SAEs, 1 being the best; equal "
    "figures share a rank. *Mean rank* is over the figures that all of them have, *better than random* counts those in "
    "which an SAE is better than the same SAE with random weights. SAEs of different L0 are compared at different "
    "prices: read the figures beside it."
)


def beside(line: Headline) -> dict[str, tuple[str, str]]:
    """``{what a figure stands beside: features and control of that row}``."""
    kept = "recon" if line.features == "recon" else "raw"
    return {RANDOMS: (line.features, RANDOM), "raw features": ("raw", TRAINED), "components": (kept, PCA)}


def figure_of(rows: Sequence[Mapping[str, Any]], line: Headline, of: tuple[str, str] | None = None) -> float | None:
    """A headline's figure in the rows of a card, or that ``of`` other features and control; None where none is."""
    wanted = (line.head, line.score, *(of or (line.features, TRAINED)))
    own = [r for r in rows if (r["head"], r["score"], r["features"], r["control"]) == wanted]
    own = [r for r in own if r["value"] is not None]
    own = [r for r in own if r["set"] == (line.set or "test")] or own
    return own[0]["value"] if own else None


def table_of(cards: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A line for every SAE: latents, L0, and for every headline the figure, its rank, and what it stands beside."""
    lines = [
        {"sae": name, "latents": card["d_sae"], "L0": figure_of(card["rows"], Headline("core", "L0"))}
        for name, card in cards.items()
    ]
    ranks: list[list[int]] = [[] for _ in lines]
    better, compared = [0] * len(lines), [0] * len(lines)
    for h in HEADLINES:
        values = [figure_of(card["rows"], h) for card in cards.values()]
        if all(v is None for v in values):
            continue
        sign = -1 if h.best == "min" else 1
        for i, (line, card, value) in enumerate(zip(lines, cards.values(), values, strict=True)):
            others = {f"{h.name}, {what}": figure_of(card["rows"], h, of) for what, of in beside(h).items()}
            random = others[f"{h.name}, {RANDOMS}"]
            rank = None if value is None else 1 + sum(v is not None and sign * (v - value) > 0 for v in values)
            line |= {h.name: value, f"{h.name}, rank": rank, **others}
            if None not in values:
                ranks[i].append(rank)
            if value is not None and random is not None:
                compared[i] += 1
                better[i] += sign * (value - random) > 0
    for line, own, won, of in zip(lines, ranks, better, compared, strict=True):
        line["mean rank"] = sum(own) / len(own) if own else None
        line["better than random"] = f"{won} of {of}"
    return lines


def shown(lines: Sequence[Mapping[str, Any]]) -> dict[str, Table]:
    """The table of SAEs in the order of their mean ranks, and one of each kind of figures that theirs stand beside."""
    names = [h.name for h in HEADLINES if h.name in lines[0]]
    order = sorted(lines, key=lambda x: (x["mean rank"] is None, x["mean rank"] or 0))

    def cell(line: Mapping[str, Any], name: str) -> str | None:
        value = line[name]
        return None if value is None else f"{value:.3f} ({line[f'{name}, rank']})"

    about, ends = ["sae", "latents", "L0"], ["mean rank", "better than random"]
    body = [[*(x[a] for a in about), *(cell(x, n) for n in names), *(x[e] for e in ends)] for x in order]
    tables = {"SAEs": Table([*about, *names, *ends], body)}
    for what in beside(HEADLINES[0]):
        some = [n for n in names if any(x[f"{n}, {what}"] is not None for x in order)]
        tables[what] = Table(["sae", *some], [[x["sae"], *(x[f"{n}, {what}"] for n in some)] for x in order])
    return tables


def settings_of(suite: Any, **more: Any) -> dict[str, Any]:
    """What identifies a job of a suite."""
    return json.loads(json.dumps({"suite": {**asdict(suite), "path": Path(suite.path).name}, **more}, default=str))
