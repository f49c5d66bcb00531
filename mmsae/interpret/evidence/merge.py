"""The folder of evidence from the parts of all tars: arrays are streamed part by part, lists block by block."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmsae.activations.spool import Spool
from mmsae.interpret.evidence.corpus import CorpusItems
from mmsae.interpret.evidence.folder import BINS, HALVES, ITEMS, SparseRows, map_arrays
from mmsae.interpret.evidence.lists import RankedBlock, latent_blocks, positives_of, top_of
from mmsae.interpret.evidence.negatives import Silence
from mmsae.interpret.evidence.options import Evidencing
from mmsae.interpret.evidence.parts import LatentCounts
from mmsae.jobs.estimate import progress_bar

ENTRIES = 1 << 22  # copied at a time


class Writing:
    """A safetensors file that appears as a whole, array by array; a context manager."""

    def __init__(self, path: Path) -> None:
        self.spool = Spool(path)

    def append(self, name: str, rows: np.ndarray) -> None:
        """Add rows to an array, some at a time."""
        rows = rows.view(np.uint8) if rows.dtype == bool else rows
        for lo in range(0, max(1, len(rows)), ENTRIES):
            self.spool.append(name, torch.from_numpy(np.array(rows[lo : lo + ENTRIES])))

    def __enter__(self) -> Writing:
        return self

    def __exit__(self, kind: Any, *error: Any) -> None:
        try:
            if kind is None:
                self.spool.finish()
        finally:
            self.spool.close()


def write_items(folder: Path, corpus: CorpusItems) -> None:
    """``items.parquet``, one row group a tar; the views are not known yet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    half = np.array(HALVES)[corpus.test.astype(int)]
    with pq.ParquetWriter(folder / ITEMS, items_schema(corpus.copies), compression="zstd") as writer:
        for part, first in corpus.parts():
            about = part.about()
            at = slice(first, first + len(about["uid"]))
            columns = {k: about[k] for k in ("uid", "key", "caption", "label")}
            columns |= {"shard": [about["shard"]] * len(about["uid"]), "half": half[at], "copy_of": corpus.copy_of[at]}
            columns |= {f"copy_of_{m}": c[at] for m, c in corpus.copies.items()}
            schema = items_schema(corpus.copies)
            writer.write_table(pa.table({f.name: columns[f.name] for f in schema}, schema))


def items_schema(modalities: Sequence[str]) -> Any:
    """Columns of ``items.parquet``."""
    import pyarrow as pa

    names = [(n, pa.string()) for n in ("uid", "shard", "key", "caption", "label", "half")]
    return pa.schema([*names, ("copy_of", pa.int32()), *((f"copy_of_{m}", pa.int32()) for m in modalities)])


def write_codes(folder: Path, corpus: CorpusItems, modality: str) -> None:
    """``codes-M.safetensors``: the parts, one behind the other."""
    with Writing(folder / f"codes-{modality}.safetensors") as out:
        out.append("start", np.zeros(1, np.int64))
        total = 0
        for part, _ in corpus.parts():
            start = total + np.cumsum(part.get(f"{modality}.count"), dtype=np.int64)
            total = int(start[-1]) if len(start) else total
            out.append("start", start)
            for name, dtype in (("latent", np.int32), ("value", np.float32), ("position", np.int32)):
                out.append(name, part.get(f"{modality}.{name}", dtype))


def write_embeddings(folder: Path, corpus: CorpusItems, modalities: Sequence[str]) -> dict[str, np.ndarray]:
    """``embeddings.safetensors`` and the arrays in it; none where there are no embeddings."""
    if not modalities:
        return {}
    path = folder / "embeddings.safetensors"
    with Writing(path) as out:
        for part, _ in corpus.parts():
            for m in modalities:
                if f"embed.{m}" in part.arrays:
                    out.append(m, part.arrays[f"embed.{m}"])
    return map_arrays(path)


def write_stats(folder: Path, corpus: CorpusItems, modalities: Sequence[str], d_sae: int) -> dict[str, LatentCounts]:
    """``stats.safetensors``."""
    counts = {m: LatentCounts(d_sae) for m in modalities}
    for part, _ in corpus.parts():
        for m, c in counts.items():
            c.merge(part.stats(m))
    with Writing(folder / "stats.safetensors") as out:
        for m, c in counts.items():
            for name in ("fired_rows", "fired_items", "sum", "sum_sq", "max"):
                out.append(f"{m}.{name}", getattr(c, name).numpy())
            out.append(f"{m}.histogram", c.histogram.view(d_sae, BINS).numpy())
    return counts


def write_lists(
    folder: Path, corpus: CorpusItems, modalities: Sequence[str], d_sae: int, choice: Evidencing,
    embed: dict[str, np.ndarray], device: torch.device, progress: bool,
) -> tuple[np.ndarray, dict[str, Any]]:  # fmt: skip
    """``lists-M``, ``top`` and ``examples``; returns which items are in evidence ``(n,) bool``, and figures.

    What is chosen of a latent is written when its block is done, so memory holds a block and a list of candidates.
    """
    wanted, about = np.zeros(corpus.n, bool), {}
    with Writing(folder / "top.safetensors") as tops, Writing(folder / "examples.safetensors") as examples:
        for m in modalities:
            codes = map_arrays(folder / f"codes-{m}.safetensors")
            rows = SparseRows(codes["start"], codes["latent"], codes["value"], d_sae)
            copies = None if choice.copies else corpus.copies[m]
            silence = Silence(corpus, copies, choice, rows, embed.get(m), device)
            starts, n_eligible, alive = [np.zeros(1, np.int64)], 0, 0
            with (
                Writing(folder / f"lists-{m}.safetensors") as lists,
                progress_bar(f"lists of {m}", "latent", progress, d_sae) as bar,
            ):
                for block in latent_blocks(corpus, m, d_sae):
                    ranked = RankedBlock.of(block, corpus, copies)
                    top = top_of(block, ranked, choice.n_top)
                    positive, eligible = positives_of(block, ranked, corpus, choice)
                    random, hard = silence.of(block, positive.reshape(len(positive), -1), eligible)
                    lists.append("item", block.item)
                    lists.append("value", block.value)
                    starts.append(starts[-1][-1] + block.start[1:])
                    for name, table in top.items():
                        tops.append(f"{m}.{name}", table)
                    for name, table in (("positive", positive), ("random", random), ("hard", hard),
                                        ("eligible", eligible)):  # fmt: skip
                        examples.append(f"{m}.{name}", table)
                    for table in (top["item"], positive, random, hard):
                        wanted[table[table >= 0]] = True
                    n_eligible += int(eligible.sum())
                    alive += int((np.diff(block.start) > 0).sum())
                    bar.update(block.high - block.low)
                lists.append("start", np.concatenate(starts))
            about[m] = {"alive": alive, "eligible": n_eligible, "copies": int((corpus.copies[m] >= 0).sum())}
    return wanted, about
