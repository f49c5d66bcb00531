"""What ``mmsae scenarios`` does: queries, conjunctions, failure slices, cards and a suite, into one folder."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mmsae.files import atomic_folder, lines_of, read_text, refuse_foreign, write_json
from mmsae.interpret.analyse.tasks import write_table
from mmsae.interpret.areas.relations import CorpusAreas
from mmsae.interpret.evidence.folder import Evidence
from mmsae.interpret.scenarios.cards import Cards, read_groups, verdicts
from mmsae.interpret.scenarios.concepts import mined_concepts
from mmsae.interpret.scenarios.failures import failure_slices
from mmsae.interpret.scenarios.mining import frequent, least_items, odd_ones, together
from mmsae.interpret.scenarios.options import Mining, SuiteOptions
from mmsae.interpret.scenarios.page import Scenarios, scenario_page
from mmsae.interpret.scenarios.ranking import about_query, run_query
from mmsae.interpret.scenarios.suite import build_suite, read_pairs, write_suite
from mmsae.metrics.concepts.names import FILE as NAMES
from mmsae.metrics.concepts.names import LatentName, names_only, read_names
from mmsae.metrics.concepts.query import query_of
from mmsae.shards import expand
from mmsae.types import IMAGE, InputError

ABOUT, REPORT, FOLDER = "scenarios.json", "report.html", "scenarios"


class Request(NamedTuple):
    """What is asked for; the fields are the command's arguments."""

    evidence: str
    out: str = ""
    query: tuple[str, ...] = ()
    failures: str = ""
    names: str = ""
    groups: str = ""
    cards: int = 200
    progress: bool = True


def find_scenarios(asked: Request, mining: Mining, suite: SuiteOptions) -> dict[str, Any]:
    """See :func:`mmsae.interpret.scenarios.command.scenarios`."""
    mining.check()
    evidence = Evidence(asked.evidence)
    target = Path(asked.out) if asked.out else evidence.folder / FOLDER
    refuse_foreign(target, ABOUT)
    known = _names(evidence, asked.names)
    groups = read_groups(asked.groups)
    failed = read_failures(asked.failures, evidence.items.uid) if asked.failures else None
    shards = _suite_shards(suite) if suite.suite else []

    def say(text: str) -> None:
        if asked.progress:
            print(f"scenarios: {text}", flush=True)

    found = _find(asked, evidence, known, groups, failed, mining, suite.seed, say)
    about = {
        "evidence": str(evidence.folder), "sae": evidence.about["job"]["sae"], "items": evidence.n,
        "mining": dataclasses.asdict(mining), "not_mined": found.why,
        "left_out": found.concepts.left_out._asdict() if found.concepts else {},
        "queries": [about_query(q, evidence.items.uid) for q in found.queries],
        "verdicts": [verdicts(c) for c in found.cards],
        "slices": [{**s._asdict(), "parts": list(s.parts)} for s in found.slices],
        "failures": {"shuffled": found.shuffled, "seed": suite.seed, **found.about_slices},
    }  # fmt: skip
    with atomic_folder(target) as folder:
        write_table(folder / "situations.parquet", situations(found))
        write_table(folder / "items.parquet", _items(found, evidence, failed))
        with (folder / "cards.jsonl").open("w", encoding="utf-8") as f:
            f.writelines(json.dumps(c, ensure_ascii=False) + "\n" for some in found.cards for c in some)
        if suite.suite:
            about["suite"] = _suite(folder / "suite", found, evidence, suite, mining, shards)
            say(f"the suite has {about['suite']['samples']:,} samples")
        scenario_page(folder / REPORT, found, evidence, about, mining)
        write_json(folder / ABOUT, about)
    say(f"{target / REPORT}")
    return {**about, "out": str(target)}


def _find(asked: Request, evidence: Evidence, known: dict[int, LatentName], groups: Any, failed: np.ndarray | None,
          mining: Mining, seed: int, say: Any) -> Scenarios:  # fmt: skip
    names = names_only(known)
    has_grid = IMAGE in evidence.modalities and evidence.grid(IMAGE).rows > 0
    areas = CorpusAreas.of_evidence(evidence) if has_grid else None
    lists = {m: evidence.lists(m) for m in evidence.modalities}
    queries, cards = [], []
    maker = Cards(evidence, names, groups, mining.present, areas)
    for text in asked.query:
        query = query_of(text, evidence.about["job"]["sae"])
        given = {"names": names, "areas": areas, "captions": evidence.items.caption, "failed": failed}
        found = run_query(query, lists, **given, most=max(asked.cards, mining.most))
        more = {"query": found.query, "rarity": found.rarity, "surprise": found.surprise}
        cards.append([
            maker.card(int(i), **more, match=float(v), criticality=_critical(failed, int(i)))
            for i, v in zip(found.items[: asked.cards], found.match, strict=False)
        ])  # fmt: skip
        queries.append(found)
        say(f"{found.query or 'all'}: holds of {found.support:,} of {evidence.n:,} items")
    concepts, why, pairs, slices, about, shuffled = None, "", None, [], {}, 0
    try:
        concepts = mined_concepts(evidence, known, mining)
    except InputError as e:
        if failed is not None or not asked.query:
            raise
        why = str(e)
    if concepts is not None:
        pairs = together(concepts, frequent(concepts, least_items(mining, concepts.n), mining.order))
        say(f"{len(pairs.rarity):,} conjunctions of {len(concepts.latents):,} concepts")
        if lost := concepts.left_out.said(mining):
            say(lost)
        if failed is not None:
            test = evidence.items.half == "test"
            slices, about = failure_slices(concepts, failed, test, mining)
            control = np.random.default_rng(seed).permutation(failed)
            shuffled = len(failure_slices(concepts, control, test, mining)[0])
            say(f"{len(slices)} slices on which the model fails more often, {shuffled} with failures shuffled")
    return Scenarios(queries, concepts, why, pairs, slices, about, shuffled, cards)


def _names(evidence: Evidence, path: str) -> dict[int, LatentName]:
    default = evidence.folder / "names" / NAMES
    found = path or (str(default) if default.exists() else None)
    return read_names(found, evidence.about["job"]["sae"])


def _critical(failed: np.ndarray | None, item: int) -> bool | None:
    return None if failed is None or np.isnan(failed[item]) else bool(failed[item] > 0)


def read_failures(path: str | Path, uids: Sequence[str]) -> np.ndarray:
    """``(n,) float64``: 1 where a model fails, 0 where not, NaN for items that the file has not.

    Raises:
        InputError: No parquet file, without the columns, or of none of the items.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not Path(path).is_file():
        raise InputError(f"failures {path}: there is no such file")
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowInvalid) as e:
        raise InputError(f"failures {path} cannot be read as parquet: {e}") from e
    kind = next((c for c in ("failed", "correct") if c in table.column_names), "")
    if "uid" not in table.column_names or not kind:
        has = ", ".join(table.column_names) or "none"
        raise InputError(f"failures {path} needs the columns uid and failed (or correct), and it has {has}")
    at = {u: i for i, u in enumerate(uids)}
    rows = np.array([at.get(u, -1) for u in table["uid"].to_pylist()], int)
    value = np.array([np.nan if v is None else float(v) for v in table[kind].to_pylist()])
    if not (rows >= 0).any():
        raise InputError(f"failures {path} has {len(rows):,} uids, and none is of the {len(uids):,} items")
    out = np.full(len(uids), np.nan)
    out[rows[rows >= 0]] = (value if kind == "failed" else 1 - value)[rows >= 0]
    return out


def situations(found: Scenarios) -> list[dict[str, Any]]:
    """Rows of situations.parquet: conjunctions, and failure slices."""
    rows = []
    if found.pairs is not None and found.concepts is not None:
        p = found.pairs
        figures = zip(p.found.parts, p.found.support, p.rarity, p.surprise, p.log_p, p.q, strict=True)
        for parts, support, rare, odd, log_p, q in figures:
            rows.append({
                "kind": "conjunction", "query": found.concepts.said(parts), "name": found.concepts.called(parts),
                "support": int(support), "rarity": float(rare), "surprise": float(odd), "log_p": float(log_p),
                "q": float(q), "failures": None, "rate": None, "low": None, "high": None, "lift": None,
            })  # fmt: skip
    for s in found.slices:
        rows.append({
            "kind": "failure", "query": s.query, "name": s.name, "support": s.support, "rarity": None, "surprise": None,
            "log_p": float(np.log(max(s.p, 1e-300))), "q": s.q, "failures": s.failures, "rate": s.rate, "low": s.low,
            "high": s.high, "lift": s.lift,
        })  # fmt: skip
    return rows


def _items(found: Scenarios, evidence: Evidence, failed: np.ndarray | None) -> list[dict[str, Any]]:
    items = evidence.items
    return [
        {"query": q.query, "rank": rank, "uid": items.uid[i], "shard": items.shard[i], "key": items.key[i],
         "match": float(v), "failed": _critical(failed, int(i))}
        for q in found.queries
        for rank, (i, v) in enumerate(zip(q.items, q.match, strict=True))
    ]  # fmt: skip


def _suite_shards(suite: SuiteOptions) -> list[str]:
    if not suite.shards:
        raise InputError("a suite is written from the samples' files: --shards names the shards of the evidence")
    return list(expand(list(suite.shards)))


def _suite(out: Path, found: Scenarios, evidence: Evidence, suite: SuiteOptions, mining: Mining, shards: list[str]
           ) -> dict[str, Any]:  # fmt: skip
    """Write the suite of the failure slices, or else of the most surprising conjunctions."""
    if found.concepts is None:
        raise InputError(f"there are no situations to make a suite of: {found.why}")
    chosen = [list(s.parts) for s in found.slices]
    if not chosen and found.pairs is not None:
        order = odd_ones(found.pairs, mining)
        chosen = [[int(v) for v in found.pairs.found.parts[k] if v >= 0] for k in order]
    if not chosen:
        raise InputError("there are no situations to make a suite of: no failure slice and no surprising conjunction")
    allowed = evidence.items.half == "test"  # the half on which the situations were not found
    if suite.exclude:
        known = set(map(str.strip, lines_of(read_text(suite.exclude))))
        allowed &= np.array([u not in known for u in evidence.items.uid])
    pair = read_pairs(shards, evidence.items.uid, suite.pair_field) if suite.pair_field else None
    codes = evidence.codes(mining.modality).matrix()
    entries = build_suite(found.concepts, codes, chosen, suite.suite, allowed=allowed, pair=pair, seed=suite.seed)
    if not entries:
        raise InputError(f"no item is left for a suite of {len(chosen)} situations: {int(allowed.sum())} may be in it")
    n = write_suite(out, entries, shards, evidence.items.uid)
    off = [e.off_by for e in entries if e.role == "control"]
    return {
        "samples": n, "situations": [found.concepts.said(np.array(p)) for p in chosen],
        "items": len(entries) - len(off),
        "controls": len(off), "minimal_pairs": sum(v <= 0 for v in off), "seed": suite.seed,
    }  # fmt: skip
