"""The page of ``mmsae filter``, on which a person sees what was kept, what was not, and why."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq

from mmsae.filtering.columns import Column, ScoredSamples, histogram
from mmsae.filtering.pair_weights import PairWeights
from mmsae.report.figures import INK, PALETTE, Figure, canvas, figure
from mmsae.report.gallery import Bar, CodePair, thumbnail
from mmsae.report.page import Fact, Section, Table, render_report
from mmsae.shards import FaultLog, read_shard, with_image

SHOWN = 12  # examples of each kind
TARS = 4  # that examples are taken from


class FilterResult(NamedTuple):
    """What the page shows of a filter job."""

    folder: Path  #: Where the result is being put together.
    paths: list[str]  #: The input shards.
    samples: ScoredSamples  #: All samples.
    kept: Column  #: ``(N,)`` bool.
    weights: PairWeights  #: Weights and labels of the latents.
    results: dict[str, Any]  #: What ``results.json`` will hold.


class Example(NamedTuple):
    """A sample to show: its row in ``scores.parquet`` as a dict, and its image."""

    row: dict[str, Any]
    image: Any


def write_report(result: FilterResult) -> None:
    """Write ``report.html`` into the folder of a result."""
    r, score = result.results, result.results["job"]["score"]
    # the worst of the dropped, the last dropped and the first kept, and the best, of a few tars
    order, on = _ordered(result, score)
    dropped, kept = order[~on], order[on]
    shown = {
        "Dropped: the lowest scores": dropped[:SHOWN],
        "Dropped: the highest scores": dropped[::-1][: SHOWN // 2],
        "Kept: the lowest scores": kept[: SHOWN // 2],
        "Kept: the highest scores": kept[::-1][: SHOWN // 2],
    }
    examples = load_examples(result, np.concatenate(list(shown.values())))
    sections = [
        Section(
            "Result",
            "Every score is in `scores.parquet`, whichever was chosen. No code score was seen to beat the cosine of a"
            " host trained on clean pairs; what codes add is the reason.",
            facts=[
                Fact("kept", r["kept"], f"of {r['kept'] + r['dropped']:,} by {score}"),
                *([Fact("fit the query", r["query"]["holds"], r["query"]["query"])] if "query" in r else []),
                Fact("dropped", r["dropped"]),
                Fact("unusable", r["faults"]["dropped"], f"of {r['faults']['seen']:,} read"),
                Fact("shards written", r["written_shards"]),
            ],
            figures=[_histogram(result, score)],
            tables=[_scores(r), _spearman(r, score)],
        )
    ]
    if "selection" in r:
        sections.append(_selection(r["selection"], r["job"]))
    times = "the concept's cross-modal weight (1 where the score needs none)."
    if "pair_code" in r["scores"]:
        times = "how closely the concept's image and text values go together."
    how = (
        "Bars: concepts that only the image (left) or only the text (right) has, strongest first; the length is the"
        f" share of the code's norm times {times}"
    )
    for title, rows in shown.items():
        if len(rows):
            pairs = [_pair(examples[i], score) for i in rows.tolist() if i in examples]
            sections.append(Section(title, how if "Dropped" in title else "", pairs=pairs))
    sections.append(_concepts(result, [examples[i].row for i in examples]))
    render_report(
        result.folder / "report.html",
        f"Filtered by {score}",
        sections,
        meta={"score": score, "keep": r["job"]["keep"], "select": r["job"]["select"], "seed": r["job"]["seed"]}
        | ({"query": r["query"]["query"]} if "query" in r else {}),
        data={k: v for k, v in r.items() if k != "job"},
    )


def _tars(sizes: Sequence[int]) -> list[int]:
    """A few tars with samples, evenly spread: images need a pass over each."""
    full = [i for i, n in enumerate(sizes) if n]
    return full[:: -(-len(full) // TARS)]


def _ordered(result: FilterResult, score: str) -> tuple[np.ndarray, np.ndarray]:
    """The samples of a few tars from the lowest score to the highest, and which of them are kept."""
    starts, samples = result.samples.starts, result.samples
    ranges = [(starts[i], starts[i + 1]) for i in _tars(samples.sizes)]
    rows = np.concatenate([np.arange(*r) for r in ranges])
    values, uids, on = (np.concatenate([c.part(*r) for r in ranges])
                        for c in (samples.numbers[score], samples.uids, result.kept))  # fmt: skip
    order = np.lexsort((uids[:, 1], uids[:, 0], values))
    return rows[order], on[order]


def load_examples(result: FilterResult, rows: np.ndarray) -> dict[int, Example]:
    """``{sample: example}`` of some samples."""
    starts, out = result.samples.starts, {}
    table = _table_rows(result.folder / "scores.parquet", rows)
    by_uid = {row["uid"]: (int(i), row) for i, row in zip(rows, table, strict=True)}
    for i, path in enumerate(result.paths):
        wanted = {u for u, (row, _) in by_uid.items() if starts[i] <= row < starts[i + 1]}
        if wanted:
            for sample in read_shard(path, FaultLog(), need=("image",), decode=False):
                if sample.uid in wanted:
                    out[by_uid[sample.uid][0]] = sample
    decoded = {i: with_image(sample, FaultLog()) for i, sample in out.items()}
    return {i: Example(row, decoded[i] and decoded[i].image) for i, row in by_uid.values() if i in decoded}


def _table_rows(path: Path, rows: np.ndarray) -> list[dict[str, Any]]:
    """Some rows of a table, whose other row groups are not read."""
    with pq.ParquetFile(path) as file:
        ends = np.cumsum([file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)])
        group, found = np.searchsorted(ends, rows, side="right"), {}
        for i in np.unique(group).tolist():
            own = rows[group == i]
            first = ends[i] - file.metadata.row_group(i).num_rows
            found |= zip(own.tolist(), file.read_row_group(i).take(own - first).to_pylist(), strict=True)
    return [found[row] for row in rows.tolist()]


def _pair(example: Example, score: str) -> CodePair:
    row = example.row
    bars = []
    for side in ("text_only", "image_only"):
        for name, x in zip(row[side], row[f"{side}_strengths"], strict=True):
            image, text = (0.0, x) if side == "text_only" else (x, 0.0)
            bars.append(Bar(name, image, text, image, text, False))
    top = max((max(b.image, b.text) for b in bars), default=1.0)
    bars = [b._replace(image=b.image / top, text=b.text / top) for b in bars]
    shown = None if example.image is None else thumbnail(example.image, f"image of {row['key']}", size=160)
    return CodePair(f"{score} {row[score]:.3f}", shown, row["caption"], row.get("pair_code", float("nan")), bars)


def _histogram(result: FilterResult, score: str) -> Figure:
    """The score of all samples, kept and dropped stacked."""
    column, all_, lowest = result.samples.numbers[score], result.results["scores"][score], result.results["threshold"]
    edges, counts = histogram(column, result.kept, (all_["min"], all_["max"]))
    with canvas(width=7.2, height=2.8) as (fig, ax):
        ax.hist(
            [edges[:-1]] * 2, edges, weights=list(counts), stacked=True, color=PALETTE[:2], label=["kept", "dropped"]
        )
        ax.axvline(lowest, ls="--", lw=1, color=INK)
        ax.set(xlabel=score, ylabel="samples")
        ax.legend()
        text = f"{score} of {len(column):,} samples; the lowest kept has {lowest:.3f} (dashed)"
        return figure(fig, f"histogram of {score}, kept and dropped", text)


def _scores(r: dict[str, Any]) -> Table:
    names = ("mean", "std", "p05", "median", "p95")
    rows = [[c, *(r["scores"][c][n] for n in names), r["scores_kept"][c]["mean"]] for c in r["scores"]]
    return Table(["", *names, "mean of the kept"], rows, "All scores and counts, over all usable samples")


def _spearman(r: dict[str, Any], score: str) -> Table:
    names = list(r["spearman"])
    rows = [[a, *(r["spearman"][a][b] for b in names)] for a in names]
    return Table(["", *names], rows, f"Spearman correlations: does {score} follow length or the number of latents?")


def _selection(s: dict[str, Any], job: dict[str, Any]) -> Section:
    columns = {"objective": "max", "kl": "min", "kl_held_out": "min", "latents_covered": "max"}
    have = {c: best for c, best in columns.items() if c in s}
    more = f", and {s['swaps']:,} swaps after the greedy choice" if "swaps" in s else ""
    rows = [[k, *(s[c][k] for c in have)] for k in s["objective"]]
    text = (
        f"`{job['select']}` over the codes of the {job['select_on']}s, from {s['candidates']:,} candidates of"
        f" {s['tars']} tars{more}. A log objective is nearly flat, so judge by the KL to the target"
        " (in nats; `kl_held_out` is to items of the target that the choice did not see)."
    )
    return Section("The chosen set", text, tables=[Table(["set", *have], rows)])


def _concepts(result: FilterResult, rows: Sequence[dict[str, Any]]) -> Section:
    ids = sorted({j for row in rows for s in ("text_only", "image_only") for j in row[f"{s}_latents"]})
    concepts = result.weights.concepts
    cells = [
        [
            f"#{j}",
            concepts[j].label,
            concepts[j].by or "its captions",
            float(result.weights.scorer.weights[j]),
            " / ".join(concepts[j].captions),
        ]
        for j in ids
        if j in concepts
    ]
    columns = ["latent", "called", "by", "cross-modal weight", "top captions"]
    return Section("Concepts named above", tables=[Table(columns, cells)] if cells else [])
