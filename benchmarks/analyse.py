"""Seconds and memory of ``mmsae analyse diff`` and ``correlate`` over generated evidence, without a host.

    python -m benchmarks.analyse [--items 1000000] [--latents 16384] [--fires 32] [--tasks diff correlate]

Random pooled codes are put together as ``mmsae evidence`` does (:mod:`benchmarks.evidence`). A is half of the items; an
item in which one of 20 latents fires is in it four times out of five, so these latents differ and others do not. Memory
is that of the process above what it had before, and mapped pages of files beside it, as there.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.evidence import _status, merge, watched, write_parts
from mmsae.files import write_json
from mmsae.interpret.analyse.command import analyse
from mmsae.interpret.evidence.folder import ABOUT, FORMAT, Evidence
from mmsae.interpret.evidence.options import Evidencing
from mmsae.options import call
from mmsae.types import IMAGE

PLANTED = 20


def write_evidence(folder: Path, items: int, d_sae: int, fires: int) -> Evidence:
    """A folder of evidence of random codes."""
    for _ in merge(folder / "evidence", write_parts(folder / "parts", items, d_sae, fires), d_sae, Evidencing()):
        pass
    grid = {"rows": 0, "cols": 0, "places": 1, "steps": []}
    write_json(folder / "evidence" / ABOUT, {
        "format": FORMAT, "job": {"sae": "s" * 32, "host": "h" * 32, "pool": "max"}, "n_items": items, "d_sae": d_sae,
        "modalities": [IMAGE], "grid": {IMAGE: grid}, "captions": False, "images": False, "embedder": {}, "faults": {},
    })  # fmt: skip
    return Evidence(folder / "evidence")


def write_side(file: Path, evidence: Evidence, seed: int = 0) -> np.ndarray:
    """Write the uids of A, and return the latents that are more frequent there."""
    rng, fired = np.random.default_rng(seed), evidence.stats(IMAGE).fired_items
    planted = rng.choice(np.flatnonzero((fired > 0.0005 * evidence.n) & (fired < 0.01 * evidence.n)), PLANTED, False)
    lists, chance = evidence.lists(IMAGE), np.full(evidence.n, 0.5)
    for j in planted.tolist():
        chance[lists.row(j)[0]] = 0.8
    uid = evidence.items.uid
    file.write_text("".join(f"{uid[i]}\n" for i in np.flatnonzero(rng.random(evidence.n) < chance)))
    return planted


def measure(task: str, evidence: Evidence, out: Path, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a task writes, and its seconds and memory in MB."""
    before, start = _status("RssAnon"), time.perf_counter()
    seen: list[tuple[float, float]] = [(before, 0.0)]
    with watched(seen):
        about = call(analyse, task, [str(evidence.folder)], str(out), **options)
    took, (anon, file) = time.perf_counter() - start, (max(column) for column in zip(*seen, strict=True))
    row = {"task": task, "seconds": round(took, 1), "memory_mb": round(anon - before), "mapped_mb": round(file)}
    return about, row


def main(args: Sequence[str] | None = None) -> int:
    """Measure, and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--latents", type=int, default=16_384)
    parser.add_argument("--fires", type=int, default=32)
    parser.add_argument("--tasks", nargs="+", choices=("diff", "correlate"), default=["diff"])
    parser.add_argument("--folder", default=None, help="where the evidence is kept; default: it is removed")
    asked = parser.parse_args(args)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(asked.folder or temporary)
        if not (folder / "evidence" / ABOUT).exists():
            write_evidence(folder, asked.items, asked.latents, asked.fires)
        planted = write_side(folder / "a.txt", Evidence(folder / "evidence"))
        for task in asked.tasks:
            options = {"uids": str(folder / "a.txt")} if task == "diff" else {}
            about, row = measure(task, Evidence(folder / "evidence"), folder / task, **options)
            if task == "diff":
                first = {r["latent"] for r in about["first"][:PLANTED]}
                row |= {"found": about["differences"], "planted_first": len(first & set(planted.tolist()))}
            print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
