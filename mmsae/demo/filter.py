"""The part of ``mmsae demo`` about filtering: a set with damaged captions, what is dropped from it, and why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mmsae.demo.stages import SEEDS
from mmsae.files import write_json

KEEP = 0.7  # as many as are undamaged
SWAP, ATTRIBUTE = "swap", "attribute"
SHARE = 0.15  # of the samples, of each kind of damage
TRUTH, RESULTS = "damaged.json", "filter_results.json"


def write_damaged(root: Path, n: int) -> None:
    """Shards in which .15 of the captions are another image's and .15 have one wrong attribute.

    The truth goes to a file beside them, ``{uid: {kind, caption, wrong}}``: nothing in the shards tells it.
    """
    import numpy as np

    from mmsae.world.generator.captions import damage, swap
    from mmsae.world.generator.data import generate
    from mmsae.world.generator.shards import write_samples

    data = generate(n, SEEDS["filter"], siblings=False)
    captions, swapped = swap(data.full, SEEDS["filter"], SHARE)
    wrong, which = damage(data.scenes, SEEDS["filter"])
    clean = np.random.default_rng(SEEDS["filter"]).permutation(np.flatnonzero(~swapped))
    truth = {data.uids[i]: {"kind": SWAP, "caption": data.full[i], "wrong": ""} for i in np.flatnonzero(swapped)}
    for i in clean[: round(SHARE * n)].tolist():
        captions[i] = wrong[i]
        truth[data.uids[i]] = {"kind": ATTRIBUTE, "caption": data.full[i], "wrong": which[i]}
    write_samples(root / "damaged", "damaged", data.images, captions, [{"uid": u} for u in data.uids])
    write_json(root / TRUTH, truth)


def filter_damaged(root: Path, sae: str, names: dict[int, str], progress: bool = True) -> None:
    """``mmsae filter`` of that set, and how well its result fits the truth."""
    from mmsae.filtering.command import Keeping, Scoring, filter_command
    from mmsae.options import SAERun

    write_json(root / "names.json", names)
    filter_command(
        str(root / sae / "sae"),
        str(root / "damaged"),
        str(root / "filter"),
        f"local-dir:{root / 'clip'}",
        scoring=Scoring("pair_weighted", names=str(root / "names.json")),
        keeping=Keeping(KEEP),
        run=SAERun("cpu", workers=0, progress=progress),
    )
    write_json(root / RESULTS, judge(root))


def judge(root: Path) -> dict[str, Any]:
    """Figures of a filtered set whose truth is known, and examples for the report."""
    import pyarrow.parquet as pq

    from mmsae.filtering.truth import damage_auroc

    truth, table = json.loads((root / TRUTH).read_text()), root / "filter" / "scores.parquet"
    rows = pq.read_table(table).to_pylist()
    kind = {u: t["kind"] for u, t in truth.items()}
    uids = [r["uid"] for r in rows]
    clean = [u for u in uids if u not in truth]
    auroc = {}
    for k in (SWAP, ATTRIBUTE):
        bad = [u for u in uids if kind.get(u) == k]
        auroc[k] = damage_auroc(table, bad, among=[*clean, *bad])
    kept = [r for r in rows if r["kept"]]
    dropped = [r for r in rows if not r["kept"]]
    named = [named_first(r, truth[r["uid"]]["caption"]) for r in dropped if kind.get(r["uid"]) == ATTRIBUTE]
    worst = sorted(dropped, key=lambda r: (r["pair_weighted"], r["uid"]))
    pick = {k: [r for r in worst if kind.get(r["uid"], "") == k] for k in (ATTRIBUTE, SWAP, "")}
    best = sorted(kept, key=lambda r: (-r["pair_weighted"], r["uid"]))
    examples = {
        "One wrong word, dropped": [r for r in pick[ATTRIBUTE] if named_first(r, truth[r["uid"]]["caption"])][:4],
        "Another image's caption, dropped": pick[SWAP][:2],
        "Right caption, dropped all the same": pick[""][:2],
        "Right caption, kept": [r for r in best if r["uid"] not in truth][:2],
        "One wrong word, kept": [r for r in reversed(best) if kind.get(r["uid"]) == ATTRIBUTE][:2],
    }
    columns = ("uid", "caption", "pair_weighted", "text_only", "text_only_strengths", "image_only",
               "image_only_strengths")  # fmt: skip
    share = lambda some: sum(r["uid"] in truth for r in some) / max(1, len(some))  # noqa: E731
    return {
        "score": "pair_weighted",
        "samples": len(rows),
        "kept": len(kept),
        "damaged": {k: sum(v == k for v in kind.values()) for k in (SWAP, ATTRIBUTE)},
        "damaged_share": {"before": share(rows), "kept": share(kept), "dropped": share(dropped)},
        "dropped_share": {
            k: sum(kind.get(r["uid"], "") == k for r in dropped) / max(1, sum(kind.get(u, "") == k for u in uids))
            for k in (SWAP, ATTRIBUTE)
        },
        "auroc": auroc,
        "reason_named": {"share": sum(named) / max(1, len(named)), "of": len(named)},
        "examples": {
            title: [{c: r[c] for c in columns} | {"truth": truth.get(r["uid"], {}).get("caption", "")} for r in some]
            for title, some in examples.items()
        },
    }


def named_first(row: dict[str, Any], truth: str) -> bool:
    """Whether the first three reasons of a sample name a word that only its caption has, or only the true one."""
    said, true = set(row["caption"].split()), set(truth.split())
    reasons = [(row["text_only"], said - true), (row["image_only"], true - said)]
    return any(words & set(name.replace("/", " ").split()) for names, words in reasons for name in names[:3])
