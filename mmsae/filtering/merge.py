"""The result of a filter job's parts: which samples are kept, their uids and the table of all, in flat memory.

The threshold is found by counting leading bits of the scores and sorting those samples alone that share the threshold's
(:func:`mmsae.partitions.nth`); places in the order of choice and the sorted uids come from partitioned files. What
is known of every sample lies in columns on disk, 30 to 100 bytes a sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmsae.files import atomic_file, disk_errors
from mmsae.filtering import columns
from mmsae.filtering.columns import Column, ScoredSamples
from mmsae.partitions import ascending, nth, order_key
from mmsae.shards.uids import DATACOMP

ROW_GROUPS = 4096
"""At most about so many in a table: a part is one, or several where there are more; each costs memory in the footer."""


class Kept(NamedTuple):
    """Which samples are kept."""

    on: Column  #: ``(N,)`` bool.
    order: Column  #: ``(N,)`` int32 place in the order of choice, -1 for the others.
    n: int  #: How many are kept.


def budget(n: int, keep: float) -> int:
    """Samples kept of n."""
    return math.ceil(round(keep * n, 9))  # .3 of 10 is 3, not 4


def keep_best(samples: ScoredSamples, score: str, b: int, folder: Path, among: np.ndarray | None = None) -> Kept:
    """The b samples with the highest score, best first; ties go to the lower uid.

    Args:
        samples: All samples.
        score: Name of the score.
        b: How many are kept, at least one.
        folder: Where the columns of what is kept go, and temporary files.
        among: ``(N,)`` bool, which samples may be chosen; default: all.
    """

    def ranked() -> Iterator[np.ndarray]:
        """Words of every block: score, uid."""
        for values, uids in zip(samples.numbers[score].blocks(), samples.uids.blocks(), strict=True):
            yield np.column_stack([order_key(0.0 - values.astype(np.float64)), uids])

    def allowed() -> Iterator[np.ndarray]:
        at = 0
        for block in ranked():
            yield block if among is None else block[among[at : at + len(block)]]
            at += len(block)

    last = nth(allowed, 3, b - 1)

    def on() -> Iterator[np.ndarray]:
        at = 0
        for block in ranked():
            below = block[:, 2] <= last[2]
            for word in (1, 0):
                below = (block[:, word] < last[word]) | ((block[:, word] == last[word]) & below)
            yield below if among is None else below & among[at : at + len(block)]
            at += len(block)

    kept = Column.write(folder / "kept", bool, on())

    def chosen() -> Iterator[np.ndarray]:
        at = 0
        for block, here in zip(ranked(), kept.blocks(), strict=True):
            yield np.column_stack([block[here], np.flatnonzero(here).astype(np.uint64) + np.uint64(at)])
            at += len(block)

    def placed() -> Iterator[np.ndarray]:
        at = 0
        for block in ascending(chosen, 4, folder):
            yield np.column_stack([block[:, 3], np.arange(at, at + len(block), dtype=np.uint64)])
            at += len(block)

    places = Column.write(folder / "places", np.uint64, (block.ravel() for block in placed()))
    pairs = Column(places.path, np.uint64, b, 2)
    return Kept(kept, _write_order(ascending(pairs.blocks, 2, folder), samples.n, folder), b)


def keep_rows(samples: ScoredSamples, rows: np.ndarray, folder: Path) -> Kept:
    """Samples that were chosen otherwise, ``(b,)`` in the order of choice."""
    on = np.zeros(samples.n, dtype=bool)
    on[rows] = True
    at = np.argsort(rows, kind="stable")
    pairs = np.column_stack([rows[at], at]).astype(np.uint64)
    kept = Column.write(folder / "kept", bool, iter([on]))
    return Kept(kept, _write_order(iter([pairs]), samples.n, folder), len(rows))


def _write_order(pairs: Iterator[np.ndarray], n: int, folder: Path) -> Column:
    """The column of places, from pairs of row and place that ascend by row."""

    def blocks() -> Iterator[np.ndarray]:
        held, done = np.zeros((0, 2), np.uint64), False
        for lo in range(0, n, columns.BLOCK):
            hi = min(lo + columns.BLOCK, n)
            while not done and (not len(held) or held[-1, 0] < hi):
                block = next(pairs, None)
                done = block is None
                held = held if block is None else np.concatenate([held, block])
            cut = int(np.searchsorted(held[:, 0], hi))
            out = np.full(hi - lo, -1, np.int32)
            out[held[:cut, 0].astype(np.int64) - lo] = held[:cut, 1]
            held = held[cut:]
            yield out

    return Column.write(folder / "order", np.int32, blocks())


def write_scores(
    path: Path,
    parts: Sequence[Path],
    samples: ScoredSamples,
    kept: Kept,
    label: Callable[[int], str],
    query: tuple[Column, Column] | None = None,
) -> None:
    """``scores.parquet``: every usable sample with all scores, whether it is kept, and why.

    ``parts`` are those of the ``score`` pass, ``label`` says what to call a latent, and ``query`` has whether a query
    holds of the samples, and its scores.
    """
    labels: dict[int, str] = {}
    starts = samples.starts
    full = [i for i, n in enumerate(samples.sizes) if n]
    together = -(-len(full) // ROW_GROUPS)
    with disk_errors(path), atomic_file(path) as temp:
        writer = None
        for at in range(0, len(full), together):
            group = full[at : at + together]
            lo, hi = starts[group[0]], starts[group[-1] + 1]
            table = pa.concat_tables([_part_table(parts[i]) for i in group])
            place = table.column_names.index("words")
            added: dict[str, Any] = {"kept": pa.array(kept.on.part(lo, hi)), "order": pa.array(kept.order.part(lo, hi))}
            if query is not None:
                added |= {n: pa.array(c.part(lo, hi)) for n, c in zip(("query_holds", "query"), query, strict=True)}
            for i, (name, values) in enumerate(added.items()):
                table = table.add_column(place + i, name, values)
            for side in ("text_only", "image_only"):
                ids = table[f"{side}_latents"].combine_chunks()
                latents, which = np.unique(ids.flatten().to_numpy(), return_inverse=True)
                words = pa.array([labels.setdefault(j, label(j)) for j in latents.tolist()], pa.string())
                named = pa.ListArray.from_arrays(ids.offsets, words.take(pa.array(which)))
                table = table.add_column(table.column_names.index(f"{side}_latents"), side, named)
            if writer is None:
                writer = pq.ParquetWriter(temp, table.schema, compression="zstd")
            writer.write_table(table, row_group_size=max(1, len(table)))
        writer.close()


def _part_table(path: Path) -> pa.Table:
    names = pq.read_schema(path).names
    wanted = [c for c in names if not c.startswith("code_") and "." not in c]
    return pq.read_table(path, columns=wanted).replace_schema_metadata(None)


def write_uids(path: Path, samples: ScoredSamples, kept: Kept, folder: Path) -> None:
    """DataComp's list of the kept uids: ``u8,u8``, the halves of 128 bits, sorted."""

    def uids() -> Iterator[np.ndarray]:
        for block, on in zip(samples.uids.blocks(), kept.on.blocks(), strict=True):
            yield block[on]

    about = {"descr": np.lib.format.dtype_to_descr(DATACOMP), "fortran_order": False, "shape": (kept.n,)}
    with disk_errors(path), atomic_file(path) as temp, open(temp, "wb") as file:
        np.lib.format.write_array_header_1_0(file, about)
        for block in ascending(uids, 2, folder):
            block.tofile(file)
