"""The tasks of ``mmsae analyse``: from folders of evidence to a folder with tables and a page.

Each takes what the command takes and returns what ``analysis.json`` holds; the numbers are made in the module of the
same name, for use on any sparse codes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmsae.files import atomic_folder, refuse_foreign, write_json
from mmsae.interpret.analyse import pages
from mmsae.interpret.analyse.clusters import agreement, chosen_latents
from mmsae.interpret.analyse.clusters import cluster as group
from mmsae.interpret.analyse.corpora import areas_for, presence, read_analysis, two_corpora
from mmsae.interpret.analyse.correlation import correlate as pairs_of
from mmsae.interpret.analyse.correlation import surprising
from mmsae.interpret.analyse.difference import compare
from mmsae.interpret.analyse.options import Analysing, Clustering, Correlating, Differing, Retrieving, Splitting
from mmsae.interpret.analyse.retrieval import (
    BOTH,
    Retrieved,
    concept_scores,
    dense_scores,
    held_then_dense,
    judge,
    true_of,
)
from mmsae.interpret.evidence.folder import Evidence
from mmsae.interpret.evidence.hosts import NamedHost
from mmsae.metrics.concepts.query import Query, parse, query_of
from mmsae.types import IMAGE, TEXT, InputError

ABOUT, REPORT = "analysis.json", "report.html"
FIRST = 50  # rows of a table that analysis.json has


def diff(
    evidence: Sequence[str], out: str, given: Analysing, splitting: Splitting, differing: Differing
) -> dict[str, Any]:
    """What two corpora differ in."""
    folders, modality, names = read_analysis(evidence, given)
    a, b = two_corpora(folders, splitting, names)
    found, a, b = compare(a, b, modality, differing, given.above, given.min_items)
    rows, passed = found.rows(names), found.found(differing.fdr)
    first = {r["latent"]: r for r in rows}
    about = {
        "a": {"name": a.name, "items": a.n},
        "b": {"name": b.name, "items": b.n},
        "tested": len(rows),
        "differences": len(passed),
        "first": [first[j] for j in passed[:FIRST].tolist()],
    }

    def write(folder: Path) -> None:
        write_table(folder / "differences.parquet", rows)
        page = folder / REPORT
        pages.difference_page(page, found, (a, b), modality, names, given.shown, differing.fdr)

    return _written("diff", evidence, out, (given, splitting, differing), folders, modality, about, write)


def correlate(evidence: Sequence[str], out: str, given: Analysing, correlating: Correlating) -> dict[str, Any]:
    """Which concepts go together."""
    folders, modality, names = _one("correlate", evidence, given)
    e = folders[0]
    across = correlating.across
    if across is None:
        across = not given.modality and {IMAGE, TEXT} <= set(e.modalities)
    if across and not {IMAGE, TEXT} <= set(e.modalities):
        raise InputError(f"across needs codes of image and text, and {e.folder} has {', '.join(e.modalities)}")
    sides = (IMAGE, TEXT) if across else (modality, modality)
    codes = [presence([e.codes(m).matrix()], given.above)[0] for m in dict.fromkeys(sides)]
    found = pairs_of(*codes, least=given.min_items, pairs=correlating.pairs)
    rows = found.rows(names)
    odd = surprising(rows, correlating.similar, across)
    unsaid = (found.unsaid(0, names), found.unsaid(1, names)) if across else ([], [])
    about = {"sides": list(sides), "pairs": len(rows), "surprising": odd[:FIRST], "first": rows[:FIRST]}
    if across:
        about |= {"shown_not_said": unsaid[0][:FIRST], "said_not_shown": unsaid[1][:FIRST]}

    def write(folder: Path) -> None:
        write_table(folder / "pairs.parquet", rows)
        for name, table in zip(("shown", "said"), unsaid, strict=True):
            if table:
                write_table(folder / f"{name}.parquet", table)
        pages.correlation_page(folder / REPORT, rows, odd, unsaid, e, sides, names, given.shown)

    where = " and ".join(dict.fromkeys(sides))
    return _written("correlate", evidence, out, (given, correlating), folders, where, about, write)


def cluster(evidence: Sequence[str], out: str, given: Analysing, clustering: Clustering) -> dict[str, Any]:
    """Groups of items by some concepts."""
    folders, modality, names = _one("cluster", evidence, given)
    e = folders[0]
    if clustering.clusters < 2:
        raise InputError(f"clusters is {clustering.clusters}; it must be at least 2")
    codes = e.codes(modality).matrix()
    present = presence([codes], given.above)[0]
    latents = chosen_latents(clustering, present, np.array(e.items.label), names, given.min_items)
    found = group(codes, present, latents, clustering, given.seed)
    described = found.describe(present, names, least=min(given.min_items, 5))
    agreed = agreement(found.of, e.items.label)
    sizes = np.bincount(found.of[found.of >= 0], minlength=clustering.clusters).tolist()
    about = {
        "concepts": found.latents.tolist(),
        "without": int((found.of < 0).sum()),
        "labels": agreed,
        "clusters": [{"items": n, "concepts": d} for n, d in zip(sizes, described, strict=True)],
    }

    def write(folder: Path) -> None:
        columns = zip(e.items.uid, e.items.key, found.of.tolist(), found.distance.tolist(), strict=True)
        write_table(folder / "items.parquet", [{"uid": u, "key": k, "cluster": c, "distance": d}
                                               for u, k, c, d in columns])  # fmt: skip
        pages.cluster_page(folder / REPORT, found, described, e, names, agreed)

    return _written("cluster", evidence, out, (given, clustering), folders, modality, about, write)


def retrieve(evidence: Sequence[str], out: str, given: Analysing, retrieving: Retrieving) -> dict[str, Any]:
    """Items by their properties."""
    folders, modality, names = _one("retrieve", evidence, given)
    e = folders[0]
    queries = [query_of(q, e.about["job"]["sae"]) for q in retrieving.queries]
    if not queries:
        raise InputError('queries: at least one is needed, such as --queries "red & ~circle"')
    truths = [parse(q) for q in retrieving.truth_queries] or queries
    if len(truths) != len(queries):
        raise InputError(f"{len(queries)} queries are given with {len(truths)} truth_queries; they go in pairs")
    attributes = true_attributes(e, retrieving) if retrieving.truth else None
    bound, lists = [on_side(q.bind(names), modality) for q in queries], {m: e.lists(m) for m in e.modalities}
    known = [concept_scores(q, lists, areas_for(e, q)) for q in bound]
    wanted = [None if attributes is None else true_of(t, attributes) for t in truths]
    if wrong := [t for t, w in zip(truths, wanted, strict=True) if w is not None and not w.any()]:
        raise InputError(f"the truth {wrong[0]} holds of none of the {e.n} items")
    embed = _embedder(e, modality, retrieving) if any(map(_has_words, queries)) else None
    results = []
    for query, (scores, holds), right in zip(queries, known, wanted, strict=True):
        if embed is not None and _has_words(query):
            dense = dense_scores(query, e.embeddings(modality), embed)
            scores |= {BOTH: held_then_dense(holds, dense["dense sum"]), **dense}
        quality = {} if right is None else judge(scores, right, retrieving.k, retrieving.draws, given.seed)
        results.append(Retrieved(str(query), scores, int(holds.sum()), right, quality))
    about = {
        "queries": [
            {"query": r.query, "holds": r.holds, "right": None if r.wanted is None else int(r.wanted.sum()),
             "quality": r.quality} for r in results
        ],
    }  # fmt: skip

    def write(folder: Path) -> None:
        write_table(folder / "items.parquet", _found_rows(e, results, retrieving.k))
        pages.retrieval_page(folder / REPORT, results, e, retrieving.k, names)

    return _written("retrieve", evidence, out, (given, retrieving), folders, modality, about, write)


def on_side(query: Query, modality: str) -> Query:
    """The query with what says no modality asked of this one."""
    if query.op in ("latent", "name"):
        return query if query.modality else dataclasses.replace(query, modality=modality)
    return dataclasses.replace(query, parts=tuple(on_side(p, modality) for p in query.parts))


def _has_words(query: Query) -> bool:
    """Whether a text encoder can be asked for it."""
    leaves = list(query.leaves())
    plain = query.op in ("name", "~", "&", "|") and all(_has_words(p) for p in query.parts)
    return bool(leaves) and plain


def _one(task: str, evidence: Sequence[str], given: Analysing) -> tuple[list[Evidence], str, dict[int, str]]:
    if len(evidence) > 1:
        raise InputError(f"{task} reads one folder of evidence, and {len(evidence)} are given")
    return read_analysis(evidence, given)


def true_attributes(e: Evidence, given: Retrieving) -> list[list[str]]:
    """What is true of each item, by its label or by a field of its json."""
    if given.truth == "label":
        if not any(e.items.label):
            raise InputError(f"truth is label, and no item of {e.folder} has one")
        return [[label] if label else [] for label in e.items.label]
    if not given.shards:
        raise InputError(f"truth is the field {given.truth} of json, which is read from --shards: name those of the "
                         "evidence")  # fmt: skip
    from mmsae.shards import FaultLog, expand
    from mmsae.shards.read import read_shard

    number = {u: i for i, u in enumerate(e.items.uid)}
    out: list[list[str]] = [[] for _ in number]
    met = 0
    for path in expand(given.shards):
        for sample in read_shard(path, FaultLog(), need=(), decode=False):
            if sample.uid in number and (value := sample.meta.get(given.truth)) is not None:
                out[number[sample.uid]] = [str(v) for v in (value if isinstance(value, list) else [value])]
                met += 1
    if not met:
        raise InputError(f"none of the {e.n} items of {e.folder} has a field {given.truth} in the json of these shards")
    return out


def _embedder(e: Evidence, modality: str, given: Retrieving) -> Callable[[list[str]], np.ndarray] | None:
    """What embeds phrases in the space of the items' embeddings, or None where nothing can or shall."""
    known = NamedHost.embedder_of(e, modality)
    if given.host == "none" or e.embeddings(modality) is None or not (given.host or known):
        return None
    from mmsae.evaluation.zeroshot.head import text_classes
    from mmsae.hosts import load_host

    host = load_host(given.host) if given.host else known._replace(option="host").load(precision="fp32")
    if not given.host and TEXT not in host.modalities:
        return None

    def embed(phrases: list[str]) -> np.ndarray:
        rows = text_classes(host, phrases, given.templates).float().numpy()
        if rows.shape[1] != (width := e.embeddings(modality).shape[1]):
            raise InputError(f"host {host.hint} embeds in {rows.shape[1]} numbers, and {e.folder} has those of {width}")
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    return embed


def _found_rows(e: Evidence, results: Sequence[Retrieved], k: int) -> list[dict[str, Any]]:
    """The first items of every query and way."""
    rows = []
    for r in results:
        for way, score in r.scores.items():
            for rank, i in enumerate(np.argsort(-score, kind="stable")[: max(k, FIRST)].tolist()):
                right = None if r.wanted is None else bool(r.wanted[i])
                rows.append({"query": r.query, "by": way, "rank": rank, "uid": e.items.uid[i], "key": e.items.key[i],
                             "score": float(score[i]), "right": right})  # fmt: skip
    return rows


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows as parquet; none is a file without columns."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist(list(rows)) if rows else pa.table({})
    pq.write_table(table, path, compression="zstd")


def _written(
    task: str,
    evidence: Sequence[str],
    out: str,
    options: Sequence[Any],
    folders: Sequence[Evidence],
    modality: str,
    about: Mapping[str, Any],
    write: Callable[[Path], None],
) -> dict[str, Any]:
    """Write a result as a whole, and return what its JSON holds."""
    target = Path(out or Path(evidence[0]) / "analysis" / task)
    refuse_foreign(target, ABOUT)
    job = {
        "task": task,
        "evidence": list(map(str, evidence)),
        "sae": folders[0].about["job"]["sae"],
        "modality": modality,
    }
    for group_of in options:
        job |= dataclasses.asdict(group_of)
    with atomic_folder(target) as folder:
        write(folder)
        write_json(folder / ABOUT, {"job": job, **about})
    return {"job": job, **about, "out": str(target)}
