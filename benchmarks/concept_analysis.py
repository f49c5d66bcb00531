"""Data analysis by concepts where the answer is known: planted differences, and items with one thing and not another.

    mmsae demo --out runs/demo
    python benchmarks/concept_analysis.py world --demo runs/demo --out runs/analysis
    python benchmarks/concept_analysis.py real --data ../shared/data --out runs/analysis

``world``: the demo's SAE and CLIP. *Differences*: ten times two corpora of 1,500 new scenes are drawn, in which one
concept (drawn by the seed) is in 20 % and in 5 %; found first means that the first difference is a latent whose best
concept by F1, on other scenes, is the planted one. Halves of one corpus are compared as often. *Retrieval*: forty
queries "one thing and not another" over names that ``mmsae name`` gave on training images from a list of words, on
images that nothing saw; beside the CLIP's own embeddings with its best prompts. Which way of ranking by concepts is the
main one was chosen on training images.

``real``: EfficientNet-Lite0, an SAE on the maps of a block, of 3,000 photographs. *Differences*: ten times two corpora
of CIFAR-10 images, in which one class is in 20 % and in 5 %; and two sets of different kinds.
The same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmsae import SAE
from mmsae.cli import main as mmsae
from mmsae.files import write_json
from mmsae.interpret.analyse.corpora import latent_names, presence
from mmsae.interpret.analyse.difference import difference
from mmsae.interpret.analyse.retrieval import (
    BOTH,
    CONCEPTS,
    DENSE,
    HELD,
    concept_scores,
    dense_scores,
    held_then_dense,
    judge,
    true_of,
)
from mmsae.interpret.analyse.tasks import on_side
from mmsae.interpret.evidence.folder import Evidence
from mmsae.metrics.concepts.query import parse
from mmsae.report.tables import markdown_table
from mmsae.sae import random_control
from mmsae.types import IMAGE, InputError
from mmsae.world.generator.captions import PLACES
from mmsae.world.generator.data import generate
from mmsae.world.generator.scene import CONCEPT_GROUPS, POSITIONS
from mmsae.world.generator.scene import CONCEPTS as WORLD_CONCEPTS
from mmsae.world.generator.shards import write_samples

SEEDS = range(10)
GROUPS = ("shape", "colour", "background", "position")  # of one value out of several, so that 20 % and 5 % can be drawn
SIDES, SHARES = (1500, 1500), (0.2, 0.05)
QUERIES, HALVES = 40, 20
QUIET = ["--progress", "false", "--workers", "0"]


def once(done: Path, *args: str) -> None:
    """Run a command of mmsae unless its result is there."""
    if not done.exists():
        mmsae(list(map(str, args)))


def f1_table(codes: Any, truth: np.ndarray) -> np.ndarray:
    """``(d_sae, concepts)`` F1 of "the latent fires on the image" against each concept, of a sparse ``(n, d_sae)``."""
    on = (codes != 0).astype(np.float64)
    hits = np.asarray(on.T @ truth.astype(np.float64))
    return 2 * hits / np.maximum(np.asarray(on.sum(0)).T + truth.sum(0), 1)


def planted_sides(has: np.ndarray, rng: np.random.Generator, sides: Sequence[int]) -> list[np.ndarray]:
    """Disjoint rows of two corpora in which so many have it as :data:`SHARES` says."""
    yes, no = (rng.permutation(np.flatnonzero(v)) for v in (has, ~has))
    out = []
    for n, share in zip(sides, SHARES, strict=True):
        k = round(share * n)
        if k > len(yes) or n - k > len(no):
            raise InputError(f"{k} items with and {n - k} without are needed, and {len(yes)} and {len(no)} are left")
        out.append(np.concatenate([yes[:k], no[: n - k]]))
        yes, no = yes[k:], no[n - k :]
    return out


def differences(evidence: Path, a: Sequence[str], out: Path) -> list[dict[str, Any]]:
    """``mmsae analyse diff`` of the items with some uids against the others; all rows."""
    import pyarrow.parquet as pq

    out.mkdir(parents=True, exist_ok=True)
    (out / "a.txt").write_text("\n".join(a))
    once(out / "diff", "analyse", "diff", evidence, "--uids", out / "a.txt", "--out", out / "diff")
    return pq.read_table(out / "diff" / "differences.parquet").to_pylist()


def found(rows: list[dict[str, Any]], best: np.ndarray, concept: int, own: int) -> dict[str, Any]:
    """Whether a planted difference came first, and where its best latent came."""
    passed = [r for r in rows if r["q"] <= 0.05 and r["leader"] == r["latent"]]
    rank = next((i for i, r in enumerate(rows) if r["latent"] == own), None)
    first = passed[0] if passed else None
    return {
        "first": None if first is None else first["latent"],
        "first_is_it": first is not None and int(best[first["latent"]]) == concept,
        "share_a": first and first["share_a"], "share_b": first and first["share_b"], "q": first and first["q"],
        "rank_of_best_latent": None if rank is None else rank + 1, "differences": len(passed),
    }  # fmt: skip


def false_calls(evidence: Path, uids: list[str], out: Path) -> list[int]:
    """Differences that are called between random halves of one corpus."""
    counts = []
    for seed in range(HALVES):
        half = np.random.default_rng(seed).permutation(len(uids))[: len(uids) // 2]
        rows = differences(evidence, [uids[i] for i in half], out / f"half_{seed}")
        counts.append(sum(r["q"] <= 0.05 for r in rows))
    return counts


def world(demo: Path, out: Path) -> dict[str, Any]:
    """Both parts on the generated world."""
    sae, host = demo / "paired_topk" / "sae", f"local-dir:{demo / 'clip'}"
    take = ["evidence", "--sae", sae, "--host", host, "--allow-other-site", *QUIET]
    ends = {}
    for split, pattern in (("train", "train-00000[0-3].tar"), ("test", "*.tar")):
        ends[split] = out / split
        once(ends[split], *take, "--shards", demo / "shards" / split / pattern, "--out", ends[split])
    words = out / "words.txt"
    words.write_text("\n".join(WORLD_CONCEPTS))
    names = out / "names" / "names.json"
    once(names, "name", ends["train"], "--sae", sae, "--vocabulary", words, "--methods", "vocabulary", "centroid",
         "wpmi", "--progress", "false", "--out", names.parent)  # fmt: skip
    training = Evidence(ends["train"])
    truth = concept_truth(training, demo / "shards" / "train" / "train-00000[0-3].tar")
    f1 = f1_table(training.codes(IMAGE).matrix(), truth)
    best = f1.argmax(1)
    control = random_control(SAE.from_pretrained(sae))
    chance = f1_table(codes_of(control, training), truth)
    choices = [c for g in GROUPS for c in CONCEPT_GROUPS[g]]
    planted = []
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        concept = WORLD_CONCEPTS.index(choices[rng.integers(len(choices))])
        folder = out / f"planted_{seed}"
        data = generate(6000, 1000 + seed, siblings=False)
        a, b = planted_sides(data.concepts[:, concept], rng, SIDES)
        if not (folder / "evidence").exists():
            rows = np.concatenate([a, b])
            write_samples(folder / "shards", "w", data.images[rows], [data.full[i] for i in rows],
                          [data.meta(i) for i in rows.tolist()])  # fmt: skip
            once(folder / "evidence", *take, "--shards", folder / "shards", "--out", folder / "evidence")
        rows = differences(folder / "evidence", [data.uids[i] for i in a], folder)
        own = int(f1[:, concept].argmax())
        e = Evidence(folder / "evidence")
        a_rows = np.isin(e.items.uid, [data.uids[i] for i in a])
        codes = codes_of(control, e)
        random = difference(*presence([codes[a_rows], codes[~a_rows]]), min_items=20).rows({})
        likely = int(chance[:, concept].argmax())
        planted.append({"seed": seed, "concept": WORLD_CONCEPTS[concept], "f1": float(f1[own, concept]),
                        **found(rows, best, concept, own), "random_f1": float(chance[likely, concept]),
                        "random": found(random, chance.argmax(1), concept, likely)})  # fmt: skip
    halves = false_calls(ends["test"], list(Evidence(ends["test"]).items.uid), out)
    asked = two_attribute_queries()
    judged = {split: retrieval(ends[split], names, demo / "shards" / split, host, asked) for split in ends}
    return {"planted": planted, "halves": halves, "queries": asked, "retrieval": judged}


def codes_of(sae: SAE, evidence: Evidence) -> Any:
    """``(n, d_sae)`` codes of the embeddings that the evidence has: the SAE's normaliser makes rows unit anyway."""
    from scipy.sparse import csr_matrix

    with torch.no_grad():
        return csr_matrix(sae.encode(torch.from_numpy(np.array(evidence.embeddings(IMAGE))), IMAGE).to_dense().numpy())


def concept_truth(evidence: Evidence, shards: Path) -> np.ndarray:
    """``(n, 26) bool`` which concepts are true of each item, from the json of its shards."""
    attributes = attributes_of(evidence, shards)
    return np.array([[c in own for c in WORLD_CONCEPTS] for own in attributes])


def attributes_of(evidence: Evidence, shards: Path) -> list[list[str]]:
    """The field ``concepts`` of each item."""
    from mmsae.interpret.analyse.options import Retrieving
    from mmsae.interpret.analyse.tasks import true_attributes

    return true_attributes(evidence, Retrieving(truth="concepts", shards=str(shards)))


def two_attribute_queries() -> list[str]:
    """``"red & ~circle"``: forty of all pairs of attributes of different groups, drawn once."""
    pairs = [(a, b) for g in GROUPS for h in GROUPS if g != h for a in CONCEPT_GROUPS[g] for b in CONCEPT_GROUPS[h]]
    chosen = np.random.default_rng(0).permutation(len(pairs))[:QUERIES]
    return ["{} & ~{}".format(*pairs[i]) for i in sorted(chosen.tolist())]


def retrieval(evidence: Path, names: Path, shards: Path, host: str, queries: list[str]) -> list[dict[str, Any]]:
    """The quality of every way for every query; a name that no latent has finds nothing."""
    from mmsae.hosts import load_host

    e, encoder = Evidence(evidence), load_host(host)
    known, attributes = latent_names(e, str(names)), attributes_of(e, shards)
    out = []
    for text in queries:
        query = parse(text)
        wanted = true_of(query, attributes)
        missing = [leaf.name for leaf in query.leaves() if leaf.name not in known.values()]
        if missing:
            scores, holds = dict.fromkeys((CONCEPTS, HELD), np.zeros(e.n)), np.zeros(e.n, bool)
        else:
            scores, holds = concept_scores(on_side(query.bind(known), IMAGE), {IMAGE: e.lists(IMAGE)})
        dense = dense_scores(query, e.embeddings(IMAGE), lambda phrases: prompts(encoder, phrases))
        scores |= {BOTH: held_then_dense(holds, dense["dense sum"]), **dense}
        out.append({"query": text, "right": int(wanted.sum()), "items": e.n, "without_a_name": missing,
                    "quality": judge(scores, wanted, k=20, draws=200)})  # fmt: skip
    return out


def prompts(host: Any, phrases: list[str]) -> np.ndarray:
    """``(m, d)`` unit embeddings of phrases, each concept in it as the prompts of the world say it."""
    from mmsae.world.measure.host import ATTRIBUTE_PROMPTS, embed_texts

    kind = {c: g for g in GROUPS for c in CONCEPT_GROUPS[g]}
    rows = []
    for said in phrases:
        words = said.replace(" and not ", " ").split()
        if len(words) == 1:
            templates = ATTRIBUTE_PROMPTS[kind[said]][1]
            texts = [t.format(PLACES[POSITIONS.index(said)] if said in POSITIONS else said) for t in templates]
        else:
            texts = [said, f"a {said} shape", f"a shape that is {said}"]
        x = embed_texts(host, texts).numpy()
        x = (x / np.linalg.norm(x, axis=1, keepdims=True)).mean(0)
        rows.append(x / np.linalg.norm(x))
    return np.stack(rows)


def world_tables(r: dict[str, Any]) -> str:
    """The figures of :func:`world` for a document."""
    rows = [[p["seed"], p["concept"], p["f1"], "yes" if p["first_is_it"] else "no", p["rank_of_best_latent"],
             p["share_a"], p["share_b"], p["differences"], p["random_f1"],
             "yes" if p["random"]["first_is_it"] else "no"] for p in r["planted"]]  # fmt: skip
    head = ["seed", "planted", "F1 of its best latent", "found first", "rank of that latent", "share in A", "in B",
            "differences", "random SAE: F1", "found first"]  # fmt: skip
    hits = sum(p["first_is_it"] for p in r["planted"])
    wrong = sum(n > 0 for n in r["halves"])
    said = f"Found first in {hits} of {len(r['planted'])}. Of {len(r['halves'])} pairs of random halves {wrong} had any"
    text = [markdown_table(head, rows, digits=2), "", f"{said} difference called.", ""]
    for split, every in r["retrieval"].items():
        named = [j for j in every if not j["without_a_name"]]
        for which, judged in (("all", every), ("whose two names some latent has", named)):
            ap = {
                w: [j["quality"][w]["average_precision"]["value"] for j in judged]
                for w in (CONCEPTS, HELD, BOTH, *DENSE)
            }
            rows = []
            for way, own in ap.items():
                rest = [float(np.mean([j["quality"][way][f]["value"] for j in judged])) for f in ("precision", "ndcg")]
                above = [sum(a > b for a, b in zip(ap[mine], own, strict=True)) for mine in (HELD, BOTH)]
                rows.append([way, float(np.mean(own)), *rest, *(above if way in DENSE else (None, None))])
            head = [f"{split} images, {which}: {len(judged)} queries", "AP", "P@20", "nDCG@20",
                    f"queries with *{HELD}* above it", f"with *{BOTH}*"]  # fmt: skip
            text += [markdown_table(head, rows), ""]
    return "\n".join(text)


def main(argv: Sequence[str] | None = None) -> None:
    """Run one part and print its tables, which ``OUT/PART.json`` has as numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["world", "real"])
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"), help="what mmsae demo wrote")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="CIFAR-10 and others as shards")
    parser.add_argument("--host", default="lite0", help="host of the photographs")
    parser.add_argument("--out", type=Path, default=Path("runs/analysis"))
    given = parser.parse_args(argv)
    given.out.mkdir(parents=True, exist_ok=True)
    if given.part == "world":
        result = world(given.demo, given.out)
        text = world_tables(result)
    else:
        from concept_analysis_real import real, real_tables

        result = real(given.data, given.host, given.out)
        text = real_tables(result)
    write_json(given.out / f"{given.part}.json", json.loads(json.dumps(result)))
    print(text)


if __name__ == "__main__":
    main()
