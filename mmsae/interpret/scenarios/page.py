"""The page of ``mmsae scenarios``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mmsae.interpret.analyse.pages import examples
from mmsae.interpret.evidence.folder import Evidence
from mmsae.interpret.scenarios.concepts import Concepts
from mmsae.interpret.scenarios.failures import FailureSlice
from mmsae.interpret.scenarios.mining import Together, odd_ones
from mmsae.interpret.scenarios.options import Mining
from mmsae.interpret.scenarios.ranking import QueryFound
from mmsae.report.gallery import Card, Gallery
from mmsae.report.page import Section, Table, render_report

VERDICTS = ("agree", "image_only", "text_only", "conflict")


class Scenarios(NamedTuple):
    """What was found."""

    queries: list[QueryFound]
    concepts: Concepts | None  #: None where there was nothing to mine
    why: str  #: Why there was not
    pairs: Together | None
    slices: list[FailureSlice]
    about_slices: dict[str, Any]
    shuffled: int  #: Slices that are found with failures dealt to other items: the control
    cards: list[list[dict[str, Any]]]  #: Of every query


def scenario_page(
    path: Path, found: Scenarios, evidence: Evidence, about: Mapping[str, Any], mining: Mining
) -> Path:  # fmt: skip
    """Write the page; ``found`` is what was found, ``about`` the JSON of it."""
    mined = [*_failures(found, evidence), *_together(found, evidence, mining)]
    if found.concepts is not None and (lost := found.concepts.left_out.said(mining)):
        mined = [s._replace(warnings=[*s.warnings, lost]) for s in mined]
    sections = [*_queries(found, evidence, about), *mined]
    lead = (
        "Silence of a concept is weak evidence of its absence, and a concept is as good as its name. "
        "Conjunctions are tested against chance with all that there could be in the account, failure slices on items "
        "on which they were not found."
    )
    meta = {"evidence": about["evidence"], "items": evidence.n, "SAE": about["sae"][:12]}
    if found.why:
        meta["not mined"] = found.why
    return render_report(path, "Situations", sections, lead=lead, meta=meta, data={"mining": about["mining"]})


def _card(evidence: Evidence, name: str, facts: list[tuple[str, str]], items: np.ndarray, values: np.ndarray) -> Card:
    images, captions = examples(evidence, items.tolist(), values.tolist())
    return Card(-1, name, facts, images, captions)


def _queries(found: Scenarios, evidence: Evidence, about: Mapping[str, Any]) -> list[Section]:
    if not found.queries:
        return []
    rows, cards, warnings = [], [], []
    for q in found.queries:
        fails = q.failures or {}
        rows.append([q.query or "all", q.support, q.rarity, q.surprise, fails.get("rate"), fails.get("lift")])
        facts = [("holds of", f"{q.support:,} items"), ("rarity", f"{q.rarity:.2f}")]
        cards.append(_card(evidence, q.query or "all", facts, q.items, q.match))
        warnings += [
            f"{q.query}: ~{name} misses: of the items whose caption tells {name}, it is silent on {share:.0%}"
            for name, share in q.misses.items()
        ]
    table = Table(["query", "holds of", "rarity", "surprise", "failure rate", "lift"], rows)
    said = [
        [f"{q.query or 'all'}: {group}", *(counts[v] for v in VERDICTS)]
        for q, groups in zip(found.queries, about["verdicts"], strict=True)
        for group, counts in groups.items()
    ]
    fields = Table(["field of the scene cards", *VERDICTS], said, "What image and caption say of the items' fields")
    return [
        Section("Queries", tables=[table, *[fields] * bool(said)], galleries=[Gallery(cards)], warnings=warnings)
    ]  # fmt: skip


def _failures(found: Scenarios, evidence: Evidence) -> list[Section]:
    if not found.about_slices:
        return []
    a = found.about_slices
    intro = (
        f"A model fails on {a['test_base']:.1%} of {a['test_items']:,} items. {a['mined']:,} conjunctions were mined "
        f"on the other half, {a['candidates']:,} judged here, {len(found.slices)} held up and are no near-duplicates; "
        f"with failures dealt to other items {found.shuffled} do."
    )
    columns = ["slice", "query", "items", "failure rate", "95 % from", "to", "lift", "q", "share of failures", "new"]
    rows = [
        [s.name, s.query, s.support, s.rate, s.low, s.high, s.lift, s.q, s.covers, s.new] for s in found.slices
    ]  # fmt: skip
    cards = [_of(found, evidence, np.array(s.parts), s.name, [("lift", f"{s.lift:.1f}")]) for s in found.slices[:12]]
    tables = [Table(columns, rows)] if rows else []
    return [Section("Where the model fails", intro, tables=tables, galleries=[Gallery(cards)] * bool(cards))]


def _of(found: Scenarios, evidence: Evidence, parts: np.ndarray, name: str, facts: list[tuple[str, str]]) -> Card:
    """A card of the items that a conjunction holds of."""
    on = np.ones(found.concepts.n, bool)
    for k in parts[parts >= 0]:
        on &= found.concepts.table[:, [k]].toarray().ravel()
    items = np.flatnonzero(on)
    return _card(evidence, name, facts, items, np.ones(len(items)))


def _together(found: Scenarios, evidence: Evidence, mining: Mining) -> list[Section]:
    if found.pairs is None:
        return []
    p, concepts = found.pairs, found.concepts
    odd = odd_ones(p, mining)
    rare = np.argsort(-p.rarity, kind="stable")[: mining.most]
    columns = ["situation", "query", "items", "rarity", "surprise", "q"]

    def table(which: np.ndarray, caption: str) -> Table:
        parts = p.found.parts[which]
        rows = [
            [concepts.called(s), concepts.said(s), int(n), float(r), float(o), float(q)]
            for s, n, r, o, q in zip(
                parts, p.found.support[which], p.rarity[which], p.surprise[which], p.q[which], strict=True
            )
        ]
        return Table(columns, rows, caption)

    cards = [
        _of(
            found, evidence, p.found.parts[k], concepts.called(p.found.parts[k]), [("surprise", f"{p.surprise[k]:.2f}")]
        )
        for k in odd[:12]
    ]
    tables = [table(odd, "Together more often than chance has it"), table(rare, "The rarest that were seen")]
    return [Section("Situations", tables=tables, galleries=[Gallery(cards)] * bool(cards))]
