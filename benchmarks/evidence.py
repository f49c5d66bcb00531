"""Memory and seconds of putting evidence together, by the number of items, without a host.

    python -m benchmarks.evidence [--items 10000 100000 1000000] [--latents 65536] [--fires 64] [--folder DIR]

Random pooled codes (latents of very different frequency, as real ones have) are written as the parts of tars of 10,000
items, as ``mmsae evidence`` writes them; then the parts are put together as it does. Memory is the anonymous memory of
the process (``RssAnon``), sampled every 20 ms, above what it had before: pages of files in maps, which the system takes
back when it needs them, are not counted, and are told beside it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from mmsae.interpret.evidence.corpus import CorpusItems
from mmsae.interpret.evidence.marks import CELLS, SampleMarks
from mmsae.interpret.evidence.merge import write_codes, write_embeddings, write_items, write_lists, write_stats
from mmsae.interpret.evidence.options import Evidencing
from mmsae.interpret.evidence.parts import CodesPart, TokensPart
from mmsae.interpret.evidence.rows import FiredRows, Looked, no_grid
from mmsae.interpret.evidence.shown import write_tokens
from mmsae.report.tables import markdown_table
from mmsae.types import IMAGE, Faults, ImageTextBatch

PER_TAR, BATCH = 10_000, 2_000


def synthetic_batch(rng: np.random.Generator, first: int, n: int, d_sae: int, fires: int, width: int) -> Looked:
    """``n`` random items, each with ``fires`` latents; embeddings of ``width``."""
    latent = np.sort((d_sae * rng.random((n, fires)) ** 3).astype(np.int64), 1)
    item = np.repeat(np.arange(n), fires)
    keep = np.ones(n * fires, bool)
    keep[1:] = (latent.ravel()[1:] != latent.ravel()[:-1]) | (item[1:] != item[:-1])
    value = rng.exponential(size=n * fires).astype(np.float32)
    entries = (torch.from_numpy(v[keep]) for v in (item, latent.ravel(), np.zeros(n * fires, np.int64), value))
    uids = rng.integers(0, 256, (n, 16), dtype=np.uint8).tobytes().hex()
    names = [f"{first + i:08d}" for i in range(n)]
    batch = ImageTextBatch(None, None, [uids[32 * i : 32 * i + 32] for i in range(n)], names, names, ["s.tar"] * n)
    pixels = torch.from_numpy(rng.integers(0, 256, (n, CELLS, CELLS, 3), dtype=np.uint8))
    dhash = torch.from_numpy(rng.integers(-(2**62), 2**62, n))
    ones, none = torch.ones(n, dtype=torch.uint8), torch.zeros(n, dtype=torch.int64)
    marks = SampleMarks([""] * n, [b"1234"] * n, torch.zeros(n, 4), dhash, pixels, ones, none)
    embed = torch.nn.functional.normalize(torch.from_numpy(rng.standard_normal((n, width), dtype=np.float32)), dim=1)
    fired = FiredRows(*entries, no_grid(n), n, 1)
    return Looked(batch, marks, {IMAGE: fired}, {IMAGE: embed}, {})


def write_parts(folder: Path, items: int, d_sae: int, fires: int, width: int = 64) -> tuple[list[Path], list[Path]]:
    """The ``codes`` and ``tokens`` parts of random items."""
    rng, found = np.random.default_rng(0), ([], [])
    for number, first in enumerate(range(0, items, PER_TAR)):
        paths = [folder / kind / f"{number:06d}.safetensors" for kind in ("codes", "tokens")]
        codes, tokens = CodesPart(paths[0], d_sae, [IMAGE]), TokensPart(paths[1], [IMAGE])
        for lo in range(first, min(items, first + PER_TAR), BATCH):
            n = min(BATCH, items - lo, first + PER_TAR - lo)
            looked = synthetic_batch(rng, lo, n, d_sae, fires, width)
            codes.add(looked)
            tokens.add(looked, lo - first, torch.ones(n, dtype=torch.bool))
        codes.finish(Faults(codes.n, {}, ()))
        tokens.finish()
        for paths_of, path in zip(found, paths, strict=True):
            paths_of.append(path)
    return found


def merge(folder: Path, parts: tuple[list[Path], list[Path]], d_sae: int, choice: Evidencing) -> Iterator[str]:
    """Put the parts together; gives the name of every step before it is done."""
    folder.mkdir()
    yield "items and near-duplicates"
    corpus = CorpusItems.read(parts[0], [IMAGE])
    write_items(folder, corpus)
    yield "codes, embeddings, statistics"
    write_codes(folder, corpus, IMAGE)
    embed = write_embeddings(folder, corpus, [IMAGE])
    write_stats(folder, corpus, [IMAGE], d_sae)
    yield "lists, top items, examples"
    wanted, _ = write_lists(folder, corpus, [IMAGE], d_sae, choice, embed, torch.device("cpu"), False)
    yield "rows of items in evidence"
    write_tokens(folder, corpus, parts[1], wanted)


def _status(field: str) -> float:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) / 1024


@contextmanager
def watched(seen: list[tuple[float, float]]) -> Iterator[None]:
    """While the context is open, sample anonymous memory and mapped pages in MB."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            seen.append((_status("RssAnon"), _status("RssFile")))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def measure(folder: Path, items: int, d_sae: int, fires: int) -> list[dict[str, float | int | str]]:
    """Seconds and memory of every step of putting ``items`` together."""
    parts = write_parts(folder / "parts", items, d_sae, fires)
    before, rows = _status("RssAnon"), []
    steps = merge(folder / "out", parts, d_sae, Evidencing())
    name = next(steps, None)
    while name:
        seen, start = [(before, 0.0)], time.perf_counter()
        with watched(seen):
            following = next(steps, None)
        anon, file = (max(column) for column in zip(*seen, strict=True))
        took = time.perf_counter() - start
        rows.append({"items": items, "step": name, "seconds": round(took, 1), "memory_mb": round(anon - before),
                     "mapped_mb": round(file)})  # fmt: skip
        name = following
    return rows


def main(args: Sequence[str] | None = None) -> int:
    """Measure, and print a table and JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--latents", type=int, default=65_536)
    parser.add_argument("--fires", type=int, default=64)
    parser.add_argument("--folder", default=None)
    asked, rows = parser.parse_args(args), []
    torch.set_num_threads(1)
    for items in asked.items:
        with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
            rows += measure(Path(folder), items, asked.latents, asked.fires)
            print(json.dumps(rows[-4:]), flush=True)
    print(markdown_table(list(rows[0]), [[str(v) for v in r.values()] for r in rows]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
