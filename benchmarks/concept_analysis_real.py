"""The part of ``concept_analysis.py`` on photographs: an EfficientNet-Lite0, an SAE on its maps, planted differences.

No text is read: what a latent is about is said by the classes of the images on which it fires, in images that are in no
comparison.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from concept_analysis import HALVES, QUIET, SEEDS, f1_table, found, once, planted_sides
from ood_real import train

from mmsae.interpret.analyse.corpora import Corpus, presence
from mmsae.interpret.analyse.difference import compare
from mmsae.interpret.analyse.options import Differing
from mmsae.interpret.evidence.folder import Evidence
from mmsae.report.tables import markdown_table
from mmsae.types import IMAGE

SITES = {  # where the host is read, and latents
    "maps": ("blocks.6:out[all]", 1280),  # 7 x 7 places of 320 numbers
    "pooled": ("image.pooled", 2560),  # one vector of 1280 numbers
}
ABOVE = (0.0, 0.5, 0.75, 0.9)  # percentiles above which a concept counts as present
SEEN = ("tiny_imagenet/tiny_imagenet-train-000000", "cifar10/cifar10-train-000000", "cifar10/cifar10-train-000001")
SETS = {
    "cifar": "cifar10/cifar10-test-00000[01].tar.gz",  # what is compared
    "labelled": "cifar10/cifar10-train-000002.tar.gz",  # what says which latent is of which class
    "clothing": "clothing/clothing-000001.tar.gz",
    "imagenet": "imagenet_samples/imagenet_samples-000000.tar.gz",
}
STEPS = 1000
SIDES, FIRST = ((450, 450), (600, 900)), 8  # all that 200 images of a class allow


def real(data: Path, host: str, out: Path) -> dict[str, Any]:
    """Planted differences of CIFAR-10, random halves of it, and two sets of different kinds.

    Site and percentile are those whose best latents have the largest F1 with the classes, on average, in images that
    are in no comparison.
    """
    choices, tables = {}, {}
    for name, (site, d_sae) in SITES.items():
        folder = out / name
        evidence_at(site, d_sae, data, host, folder)
        known = Evidence(folder / "labelled")
        classes = sorted(set(known.items.label))
        truth = np.array([[c == own for c in classes] for own in known.items.label])
        for above in ABOVE:
            f1 = f1_table(presence([known.codes(IMAGE).matrix()], above)[0], truth)
            choices[f"{name} above {above:g}"], tables[name, above] = float(f1.max(0).mean()), f1
    name, above = max(tables, key=lambda key: tables[key].max(0).mean())
    f1, folder = tables[name, above], out / name
    best = f1.argmax(1)
    e = Evidence(folder / "cifar")
    label = np.array(e.items.label)
    planted = []
    for sides in SIDES:
        for seed in SEEDS:
            rng = np.random.default_rng(seed)
            c = int(rng.integers(len(classes)))
            rows = rows_of(e, *planted_sides(label == classes[c], rng, sides), above)
            own = int(f1[:, c].argmax())
            what = {"sides": sides, "seed": seed, "concept": classes[c], "f1": float(f1[own, c])}
            planted.append({**what, **found(rows, best, c, own)})
    halves = []
    for seed in range(HALVES):
        order = np.random.default_rng(seed).permutation(e.n)
        halves.append(sum(r["q"] <= 0.05 for r in rows_of(e, order[: e.n // 2], order[e.n // 2 :], above)))
    both = [folder / "clothing", folder / "imagenet"]
    once(out / "sets", "analyse", "diff", *both, "--above", above, "--out", out / "sets")
    sets = two_sets(*map(Evidence, both), above)
    return {"choices": choices, "chosen": [name, above], "planted": planted, "halves": halves, "sets": sets}


def evidence_at(site: str, d_sae: int, data: Path, host: str, out: Path) -> None:
    """An SAE at a site, and evidence of all sets by it."""
    sae = out / "run" / "sae"
    if not sae.exists():
        shards = [str(data / f"{s}.tar.gz") for s in SEEN]
        once(out / "store" / "spec.json", "extract", "--host", host, "--shards", *shards, "--sites", site,
             "--dtype", "float16", "--batch-size", "32", "--out", out / "store", *QUIET)  # fmt: skip
        more = ["--data.init_args.sites", f'{{"image": "{site}"}}', "--trainer.max_steps", str(STEPS)]
        more += ["--model.sae.init_args.ratio", "null", "--model.sae.init_args.d_sae", str(d_sae)]
        train("configs/train/topk_store.yaml", out / "store", out / "run", 0, more)
    for name, shards in SETS.items():
        once(out / name, "evidence", "--sae", sae, "--host", host, "--shards", data / shards, "--out", out / name,
             "--batch-size", "32", *QUIET)  # fmt: skip


def rows_of(e: Evidence, a: np.ndarray, b: np.ndarray, above: float) -> list[dict[str, Any]]:
    """All differences of two sets of items of one folder."""
    sides = (Corpus(name, e, np.sort(rows)) for name, rows in (("A", a), ("B", b)))
    return compare(*sides, IMAGE, Differing(), above, min_items=20)[0].rows({})


def two_sets(a: Evidence, b: Evidence, above: float) -> dict[str, Any]:
    """The first differences of either sign, with the classes of the items on which each latent is strongest."""
    sides = (Corpus(e.folder.name, e, np.arange(e.n)) for e in (a, b))
    rows = compare(*sides, IMAGE, Differing(), above, min_items=20)[0].rows({})
    passed = [r for r in rows if r["q"] <= 0.05 and r["leader"] == r["latent"]]
    out: dict[str, Any] = {"differences": len(passed), "tested": len(rows)}
    for e, sign in ((a, 1), (b, -1)):
        mine = [r for r in passed if np.sign(r["difference"]) == sign][:FIRST]
        out[e.folder.name] = [{**r, "classes": classes_of(e, r["latent"])} for r in mine]
    return out


def classes_of(e: Evidence, latent: int, top: int = 20) -> list[tuple[str, int]]:
    """The most frequent classes among a latent's strongest items, with their numbers."""
    items, values = e.lists(IMAGE).row(latent)
    strongest = items[np.argsort(-np.abs(values), kind="stable")[:top]]
    return Counter(e.items.label[i] for i in strongest.tolist()).most_common(3)


def real_tables(r: dict[str, Any]) -> str:
    """The figures of :func:`real` for a document."""
    text = []
    for sides in SIDES:
        rows, own = [], [p for p in r["planted"] if tuple(p["sides"]) == sides]
        for p in own:
            first = "nothing" if p["first"] is None else "yes" if p["first_is_it"] else "another"
            rows.append([p["seed"], p["concept"], p["f1"], first, p["rank_of_best_latent"], p["share_a"], p["share_b"]])
        head = ["seed", "planted", "F1 of its best latent", "found first", "rank of that latent", "share in A", "in B"]
        hits = sum(p["first_is_it"] for p in own)
        text += [f"{sides[0]} and {sides[1]} images: found first in {hits} of {len(own)}.", "",
                 markdown_table(head, rows, digits=2), ""]  # fmt: skip
    text += [f"Of {len(r['halves'])} pairs of random halves {sum(n > 0 for n in r['halves'])} had any difference.", ""]
    picks = [
        [name, f1, "chosen" if name == "{} above {:g}".format(*r["chosen"]) else ""]
        for name, f1 in r["choices"].items()
    ]
    text = [markdown_table(["site and percentile", "mean F1 of the classes' best latents", ""], picks), "", *text]
    sets = r["sets"]
    text += [f"{sets['differences']} of {sets['tested']} latents differ between the two sets.", ""]
    rows = [[f"#{d['latent']}", side, d["share_a"], d["share_b"], ", ".join(f"{c} {n}" for c, n in d["classes"])]
            for side in ("clothing", "imagenet") for d in sets[side]]  # fmt: skip
    head = ["latent", "more in", "clothing", "imagenet", "classes of its 20 strongest"]
    return "\n".join([*text, markdown_table(head, rows, digits=2)])
