"""Situations on the generated world by an SAE's latents, where the truth is known.

    python benchmarks/scenarios.py --evidence runs/paired/evidence --shards 'shards/test-*.tar' --out runs/scenarios

Two ways of knowing which latent is which concept: the names of ``mmsae name`` in the evidence, and the latent with the
best F1 on the evidence's train half. Everything is scored on the test half:

- precision of the first 20 items of ten fixed queries, beside the share of all items that the query is true of
- a model that fails on a planted situation in 70 % of the items and in 2 % of all others: how often the first slice is
  that situation, and how many slices are found with failures shuffled, over ten seeds
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmsae.files import write_json
from mmsae.interpret.evidence.folder import Evidence
from mmsae.interpret.scenarios.concepts import mined_concepts
from mmsae.interpret.scenarios.failures import failure_slices
from mmsae.interpret.scenarios.options import Mining
from mmsae.interpret.scenarios.ranking import run_query
from mmsae.metrics.concepts.inverted import InvertedLists
from mmsae.metrics.concepts.names import FILE, LatentName, read_names
from mmsae.metrics.concepts.query import evaluate
from mmsae.report.tables import markdown_table
from mmsae.shards import FaultLog, expand, read_shards
from mmsae.types import InputError
from mmsae.world.generator.scene import CONCEPTS

QUERIES = (
    "red", "circle & blue", "striped & green", "yellow & dark", "ring & light", "purple & ~dark", "triangle & ~striped",
    "(red | green) & cross", '"two objects" & cyan', '"two objects" & square & ~red',
)  # fmt: skip
PLANTED = (("red", "dark"), ("circle", "light"), ("purple", "striped"), ("ring", "dark"), ("green", "light"))


def truth_of(shards: str, uids: Sequence[str]) -> np.ndarray:
    """``(n, 26) bool`` which concepts the items show, from the samples' json."""
    at, out = {u: i for i, u in enumerate(uids)}, np.zeros((len(uids), len(CONCEPTS)), bool)
    for sample in read_shards(expand(shards), FaultLog(), need=("json",), decode=False):
        if sample.uid in at:
            out[at[sample.uid]] = [c in sample.meta["concepts"] for c in CONCEPTS]
    return out


def matched(evidence: Evidence, truth: np.ndarray) -> dict[int, str]:
    """``{latent: concept}``: of every concept the latent that fires most as it is shown (F1) on the train half."""
    half = evidence.items.half == "train"
    fires = evidence.codes("image").matrix()[half].astype(bool).astype(float)
    shown = truth[half].astype(float)
    both = np.asarray(fires.T @ shown)
    f1 = 2 * both / np.maximum(np.asarray(fires.sum(0)).reshape(-1, 1) + shown.sum(0), 1)
    out: dict[int, str] = {}
    for c in np.argsort(f1.max(0)):  # the surest last, so that it keeps the latent
        out[int(f1[:, c].argmax())] = CONCEPTS[c]
    return out


def of_truth(truth: np.ndarray) -> Mapping[str, Any]:
    """The truth as codes, which queries are evaluated on."""
    from scipy.sparse import csr_matrix

    return {"image": InvertedLists.of(csr_matrix(truth.astype(np.float32)))}


def queries(evidence: Evidence, truth: np.ndarray, names: Mapping[int, str], k: int = 20) -> list[list[Any]]:
    """A row of every query: precision of the first k, and how often it is true."""
    test = np.flatnonzero(evidence.items.half == "test")
    lists = {"image": InvertedLists.of(evidence.codes("image").matrix()[test])}
    known = {j: n for j, n in enumerate(CONCEPTS)}
    rows = []
    for text in QUERIES:
        true = evaluate(text, of_truth(truth[test]), names=known, holds=True)
        try:
            found = run_query(text, lists, names=names, most=k)
        except InputError:  # a concept without a latent
            rows.append([text, None, float(true.mean())])
            continue
        rows.append([text, float(true[found.items].sum() / k), float(true.mean())])
    return rows


def failures(evidence: Evidence, truth: np.ndarray, names: Mapping[int, str], options: Mining, seeds: int = 10) -> dict:
    """How often a planted situation is the first slice."""
    named = {j: LatentName(n, auroc=1.0) for j, n in names.items()}
    concepts = mined_concepts(evidence, named, options)
    test = evidence.items.half == "test"
    tally = {"first": 0, "possible": 0, "slices": 0, "shuffled": 0, "lift": []}
    for seed in range(seeds):
        pair = PLANTED[seed % len(PLANTED)]
        both = truth[:, [CONCEPTS.index(c) for c in pair]].all(1)
        rng = np.random.default_rng(seed)
        failed = rng.random(len(both)) < np.where(both, 0.7, 0.02)
        slices, _ = failure_slices(concepts, failed, test, options)
        tally["possible"] += set(pair) <= set(concepts.names)
        if slices and set(slices[0].name.split(" & ")) == set(pair):
            tally["first"] += 1
            tally["lift"].append(slices[0].lift * failed[test].mean() / failed[test & both].mean())
        tally["slices"] += len(slices)
        tally["shuffled"] += len(failure_slices(concepts, rng.permutation(failed), test, options)[0])
    return tally | {"lift": float(np.mean(tally["lift"])) if tally["lift"] else None, "seeds": seeds}


def main(argv: Sequence[str] | None = None) -> Path:
    """Write the tables; returns their path."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evidence", type=Path, required=True, help="of an SAE on images of the world")
    parser.add_argument("--shards", required=True, help="that the evidence is of")
    parser.add_argument("--out", type=Path, default=Path("runs/scenarios"))
    args = parser.parse_args(argv)
    evidence = Evidence(args.evidence)
    truth = truth_of(args.shards, evidence.items.uid)
    ways = {"best F1": matched(evidence, truth)}
    if (file := args.evidence / "names" / FILE).exists():
        ways["mmsae name"] = {j: n.name for j, n in read_names(file).items() if n.name}
    found: dict[str, Any] = {"items": evidence.n}
    rows, planted = [], []
    for way, names in ways.items():
        rows.append(queries(evidence, truth, names))
        for present in (0.0, 0.5):
            options = Mining(present=present, dense=0.6)
            try:
                tally = failures(evidence, truth, names, options)
            except InputError as e:
                tally = {"not mined": str(e)}
            found[f"{way}, present {present}"] = tally
            if "first" in tally:
                planted.append([way, present, tally["possible"], tally["first"], tally["lift"], tally["slices"],
                                tally["shuffled"]])  # fmt: skip
    found["queries"] = {way: r for way, r in zip(ways, rows, strict=True)}
    table = [[first[0], first[2], *(r[k][1] for r in rows)] for k, first in enumerate(rows[0])]
    mean = ["mean", float(np.mean([r[2] for r in rows[0]])), *(float(np.mean([v[1] or 0 for v in r])) for r in rows)]
    lines = [
        markdown_table(["query", "true of", *(f"P@20, {w}" for w in ways)], [*table, mean]), "",
        markdown_table(["latents by", "present", "both mined", "first slice is it", "lift found / true", "slices",
                        "slices, shuffled"], planted),
    ]  # fmt: skip
    write_json(args.out / "scenarios.json", found)
    path = args.out / "scenarios.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    return path


if __name__ == "__main__":
    main()
