"""The pages of ``mmsae analyse``: tables, and what the latents and items of a result look like."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmsae.interpret.analyse.clusters import Clusters
from mmsae.interpret.analyse.corpora import Corpus, called
from mmsae.interpret.analyse.difference import Differences
from mmsae.interpret.analyse.retrieval import HELD, Retrieved
from mmsae.interpret.evidence.folder import Evidence
from mmsae.report.figures import GREY, INK, PALETTE, Figure, bar_chart, canvas, figure
from mmsae.report.gallery import Card, Gallery, Thumbnail
from mmsae.report.page import Fact, Section, Table, render_report

IMAGES, CAPTIONS = 8, 3  # of a card
LINES = 60  # of a table; files have all of it


def image_of(evidence: Evidence, item: int, value: float | None = None) -> Thumbnail | None:
    """An item's small image, as it lies in the evidence; None where it has none."""
    data = evidence.thumbnail(item)
    if data is None:
        return None
    kind = "webp" if data[:4] == b"RIFF" else "jpeg"
    said = evidence.items.caption[item] or evidence.items.label[item] or f"item {evidence.items.key[item]}"
    return Thumbnail(f"data:image/{kind};base64,{base64.b64encode(data).decode()}", said, value)


def examples(
    evidence: Evidence, items: Sequence[int], values: Sequence[float]
) -> tuple[list[Thumbnail], list[tuple[str, float]]]:
    """The first images and the first different captions of some items, the best first."""
    images: list[Thumbnail] = []
    captions: dict[str, float] = {}
    for item, value in zip(items, values, strict=True):
        if len(images) < IMAGES and (image := image_of(evidence, int(item), float(value))):
            images.append(image)
        text = evidence.items.caption[item]
        if text and len(captions) < CAPTIONS:
            captions.setdefault(text, float(value))
        if len(captions) == CAPTIONS and len(images) == IMAGES:
            break
    return images, list(captions.items())


def latent_card(
    evidence: Evidence,
    latent: int,
    modality: str,
    name: str,
    facts: list[tuple[str, str]],
    rows: np.ndarray | None = None,
) -> Card:
    """What a latent fires on most, among some items (default: all)."""
    items, values = evidence.lists(modality).row(latent)
    if rows is not None:
        own = np.isin(items, rows)
        items, values = items[own], values[own]
    order = np.argsort(-np.abs(values), kind="stable")[: 40 * IMAGES]
    return Card(latent, name, facts, *examples(evidence, items[order], values[order]))


def _signed(x: float) -> str:
    return f"{100 * x:+.1f}"


def difference_page(
    path: Path,
    found: Differences,
    sides: tuple[Corpus, Corpus],
    modality: str,
    names: dict[int, str],
    shown: int,
    fdr: float,
) -> None:
    """What two corpora differ in."""
    s, passed = found.shares, found.found(fdr)
    a, b = sides
    table = [
        [called(j, names), s.a[j], s.b[j], s.difference[j], f"{s.low[j]:+.3f} to {s.high[j]:+.3f}", s.z[j], found.q[j],
         "exact" if s.exact[j] else "z"]
        for j in passed[:LINES].tolist()
    ]  # fmt: skip
    columns = ["concept", f"in A ({a.name})", f"in B ({b.name})", "A - B", "95 % interval", "z", "FDR", "test"]
    galleries = []
    for side, sign, title in ((a, 1, f"More in A: {a.name}"), (b, -1, f"More in B: {b.name}")):
        cards = [
            latent_card(
                side.evidence, j, modality, names.get(j, ""),
                [("A", f"{s.a[j]:.1%}"), ("B", f"{s.b[j]:.1%}"), ("A - B", f"{_signed(s.difference[j])} points "
                 f"({_signed(s.low[j])} to {_signed(s.high[j])})")], side.rows,
            )
            for j in passed[np.sign(s.difference[passed]) == sign][: shown // 2].tolist()
        ]  # fmt: skip
        galleries += [Gallery(cards, title)] if cards else []
    tested = len(found.order)
    intro = (
        f"A latent is in an item where it fires. Of {tested:,} latents that fire on enough items to be tested,"
        f" {int((found.q[found.order] <= fdr).sum()):,} differ at a false discovery rate of {fdr:g}: {fdr:.0%} of such"
        " calls are expected to be wrong. Latents that fire on the same items are listed once, under the first of them."
    )
    facts = [Fact("items of A", found.n[0], a.name), Fact("items of B", found.n[1], b.name),
             Fact("differences", len(passed), f"of {tested:,} latents")]  # fmt: skip
    warnings = [] if len(passed) else ["No latent differs more than chance allows."]
    render_report(
        path, "Differences of two corpora",
        [Section("Result", intro, facts=facts, figures=[_shares(found, fdr, names)], warnings=warnings),
         Section("Concepts", galleries=galleries), Section("Table", tables=[Table(columns, table)] if table else [])],
        meta={"A": a.name, "B": b.name, "codes of": modality},
    )  # fmt: skip


def _shares(found: Differences, fdr: float, names: Mapping[int, str]) -> Figure:
    s, order = found.shares, found.order
    passed = found.q[order] <= fdr
    floor = 0.5 / max(found.n)  # where a share of 0 is drawn
    with canvas(width=5.2, height=4.4) as (fig, ax):
        for on, colour, label in ((~passed, GREY, "no difference"), (passed, PALETTE[1], "differs")):
            j = order[on]
            ax.scatter(s.b[j].clip(floor), s.a[j].clip(floor), s=14, lw=0, alpha=0.7, color=colour, label=label)
        ax.plot([floor, 1], [floor, 1], color=INK, lw=0.7)
        for j in found.found(fdr)[:6].tolist():
            ax.annotate(called(j, names), (max(s.b[j], floor), max(s.a[j], floor)), fontsize=8)
        ax.set(xscale="log", yscale="log", xlabel="share of the items of B", ylabel="share of the items of A")
        ax.legend(loc="lower right", markerscale=2)
        return figure(fig, "share of items of A against share of items of B in which each latent fires", "Every latent")


def correlation_page(
    path: Path,
    rows: list[dict[str, Any]],
    odd: list[dict[str, Any]],
    unsaid: tuple[list, list],
    evidence: Evidence,
    modalities: tuple[str, str],
    names: dict[int, str],
    shown: int,
) -> None:
    """Which concepts go together, and what one side alone says."""
    first, second = modalities
    columns = [f"concept ({first})", f"concept ({second})", "NPMI", "items of both", "of the first", "of the second",
               "names alike"]  # fmt: skip

    def table(pairs: list[dict[str, Any]], caption: str) -> Table:
        cells = [
            [called(r["a"], names), called(r["b"], names), r["npmi"], r["both"], r["n_a"], r["n_b"], r["alike"]]
            for r in pairs[:LINES]
        ]
        return Table(columns, cells, caption)

    cards = []
    for r in odd[: shown // 2]:
        common = np.intersect1d(*(evidence.lists(m).row(r[s])[0] for m, s in ((first, "a"), (second, "b"))))
        name = f"{called(r['a'], names)} with {called(r['b'], names)}"
        facts = [("NPMI", f"{r['npmi']:.2f}"), ("items", f"{r['both']:,}")]
        cards.append(latent_card(evidence, r["a"], first, name, facts, common))
    sections = [
        Section(
            "Surprising pairs",
            "NPMI is 1 where two concepts always come together, 0 where they are independent, -1 where they never meet."
            " A pair is surprising where it goes together though its names are unlike (without names: every pair).",
            galleries=[Gallery(cards)] if cards else [], tables=[table(odd, "The closest of them")] if odd else [],
        ),
        Section("All pairs", tables=[table(rows, "The closest pairs")] if rows else []),
    ]  # fmt: skip
    if first != second:
        for own, other, found in ((first, second, unsaid[0]), (second, first, unsaid[1])):
            cells = [
                [called(r["latent"], names), r["items"], r["same_latent_there"], r["npmi_with_itself"],
                 called(r["partner"], names) if r["partner"] >= 0 else "none", r["npmi_with_partner"]]
                for r in found[:LINES]
            ]  # fmt: skip
            head = [f"concept ({own})", "items", f"same latent in the {other}", "NPMI with itself",
                    f"closest concept ({other})", "NPMI with it"]  # fmt: skip
            cards = [
                latent_card(evidence, r["latent"], own, names.get(r["latent"], ""), [("items", f"{r['items']:,}")])
                for r in found[: shown // 4]
            ]
            sections.append(
                Section(
                    f"In the {own} and not in the {other}",
                    f"Concepts of the {own} by how little any concept of the {other} goes with them, the least first.",
                    galleries=[Gallery(cards)] if cards else [],
                    tables=[Table(head, cells)] if cells else [],
                )
            )
    title = "Concepts that go together"
    render_report(path, title, sections, meta={"items": evidence.n, "sides": " and ".join(dict.fromkeys(modalities))})


def cluster_page(
    path: Path,
    found: Clusters,
    described: list[list[dict]],
    evidence: Evidence,
    names: Mapping[int, str],
    agreed: Mapping[str, Any],
) -> None:
    """Groups of items, what distinguishes them, and the items nearest to their middle."""
    cards, rows = [], []
    for c, concepts in enumerate(described):
        inside = np.flatnonzero(found.of == c)
        order = inside[np.argsort(found.distance[inside], kind="stable")]
        name = f"cluster {c}: " + ", ".join(called(d["latent"], names) for d in concepts[:4])
        cards.append(Card(-1, name, [("items", f"{len(inside):,}")], *examples(evidence, order, found.distance[order])))
        rows += [
            [f"cluster {c}", called(d["latent"], names), d["share"], d["everywhere"], d["lift"]] for d in concepts[:8]
        ]
    compared = ", ".join(called(j, names) for j in found.latents[:30].tolist())
    more = f" and {len(found.latents) - 30:,} more" if len(found.latents) > 30 else ""
    facts = [Fact("items", int((found.of >= 0).sum()), f"{int((found.of < 0).sum()):,} have none of the concepts"),
             Fact("concepts", len(found.latents))]  # fmt: skip
    if agreed:
        facts += [Fact("adjusted Rand index", agreed["adjusted_rand"], "with the classes of the items"),
                  Fact("adjusted mutual information", agreed["adjusted_mutual_information"])]  # fmt: skip
    columns = ["cluster", "concept", "share of its items", "of all items", "lift"]
    render_report(
        path, "Clusters of items",
        [Section("Result", f"Items are compared by {compared}{more}.", facts=facts,
                 galleries=[Gallery(cards, "Items nearest to the middle of each cluster")]),
         Section("What distinguishes them", tables=[Table(columns, rows)])],
    )  # fmt: skip


def retrieval_page(
    path: Path, results: Sequence[Retrieved], evidence: Evidence, k: int, names: Mapping[int, str]
) -> None:
    """What queries found, by concepts and by dense retrieval."""
    sections, rows, chart = [], [], {}
    for r in results:
        for way, figures in r.quality.items():
            cells = [f"{figures[f]['value']:.3f} [{figures[f]['low']:.3f}, {figures[f]['high']:.3f}]"
                     for f in ("average_precision", "precision", "ndcg")]  # fmt: skip
            rows.append([r.query, way, int(r.wanted.sum()), *cells])
            chart.setdefault(way, {})[r.query] = figures["average_precision"]["value"]
    if rows:
        figures = [bar_chart(chart, y_label="average precision")] if len(results) <= 12 else []
        head = ["query", "by", "right items", "average precision", f"P@{k}", f"nDCG@{k}"]
        sections.append(Section("Quality", "With 95 % intervals over items.", tables=[Table(head, rows)],
                                figures=figures))  # fmt: skip
    for r in results:
        cards = []
        for way, score in r.scores.items():
            order = np.argsort(-score, kind="stable")[:k]
            card = Card(-1, way, [], *examples(evidence, order, score[order]))
            hits = [("right", f"{int(r.wanted[order].sum())} of {len(order)}")] if r.wanted is not None else []
            held = [("holds of", f"{r.holds:,} items")] if way == HELD else []
            cards.append(card._replace(facts=[*held, *hits]))
        sections.append(Section(r.query or "every item", galleries=[Gallery(cards)]))
    render_report(path, "Items found by their properties", sections, meta={"items": evidence.n, "names": len(names)})
