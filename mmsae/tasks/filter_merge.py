"""From the parts of a filter job to its result: the global choice, the tables, the uid list and the filtered shards.

One process, in the order of the tars; memory is a few numbers per sample (and, for a chosen set, its codes).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm import tqdm

from mmsae.files import atomic_file
from mmsae.metrics.ranking import average_ranks
from mmsae.shards import FaultLog, ShardWriter, UidSet, disk_errors, shard_name
from mmsae.shards.decode import parse_json
from mmsae.shards.names import safe_key
from mmsae.shards.read import make_uid
from mmsae.shards.tar import groups
from mmsae.types import InputError

TEXT_COLUMNS = ("uid", "key", "shard", "caption")
DATACOMP = np.dtype("u8,u8")


class Scored(NamedTuple):
    """All samples of a job, without their texts.

    Attributes:
        uids: ``(N,)`` str, in the order of the tars.
        numbers: ``{column: (N,) float}``: words, scores, counts.
        sizes: Samples of each part.
    """

    uids: np.ndarray
    numbers: dict[str, np.ndarray]
    sizes: list[int]

    @property
    def starts(self) -> list[int]:
        """Number of the first sample of each part, and of all of them last."""
        return [0, *np.cumsum(self.sizes).tolist()]


def read_scored(parts: Sequence[Path]) -> Scored:
    """The numbers of all parts.

    Raises:
        InputError: A uid occurs twice, or there is no usable sample at all.
    """
    seen, uids, tables, sizes = UidSet(), [], [], []
    for path in parts:
        names = pq.read_schema(path).names
        if "words" not in names:  # no usable sample in this tar
            sizes.append(0)
            continue
        table = pq.read_table(path, columns=[n for n in names if not n.endswith(("_latents", "_strengths", "caption"))])
        for row in zip(*(table[c].to_pylist() for c in ("uid", "shard", "key")), strict=True):
            seen.add(*row)
        uids += table["uid"].to_pylist()
        tables.append(table.drop_columns(["uid", "shard", "key"]))
        sizes.append(len(table))
    if not uids:
        raise InputError(f"not one usable sample in {len(parts)} shards")
    table = pa.concat_tables(tables)
    return Scored(np.array(uids, dtype="U32"), {c: table[c].to_numpy() for c in table.column_names}, sizes)


def budget(n: int, keep: float) -> int:
    """Samples kept of n."""
    return math.ceil(round(keep * n, 9))  # .3 of 10 is 3, not 4


def best(scored: Scored, score: str, b: int) -> np.ndarray:
    """``(b,)`` the samples with the highest score, best first; ties go to the lower uid."""
    return np.lexsort((scored.uids, -scored.numbers[score]))[:b]


def write_scores(
    path: Path, parts: Sequence[Path], scored: Scored, kept: np.ndarray, order: np.ndarray, label: Callable[[int], str]
) -> None:
    """``scores.parquet``: every usable sample with all scores, whether it is kept, and why.

    Args:
        path: The file.
        parts: Parts of the ``score`` pass.
        scored: All samples.
        kept: ``(N,)`` bool.
        order: ``(N,)`` place in the order of choice, -1 where not chosen.
        label: What to call a latent.
    """
    labels: dict[int, str] = {}
    with disk_errors(path), atomic_file(path) as temp:
        writer = None
        for file, lo, hi in zip(parts, scored.starts, scored.starts[1:], strict=False):
            if hi == lo:
                continue
            table = pq.read_table(file).replace_schema_metadata(None)
            table = table.drop_columns([c for c in table.column_names if c.startswith("code_")])
            at = table.column_names.index("words")
            table = table.add_column(at, "kept", pa.array(kept[lo:hi]))
            table = table.add_column(at + 1, "order", pa.array(order[lo:hi], pa.int32()))
            for side in ("text_only", "image_only"):
                ids = table[f"{side}_latents"].combine_chunks()
                words = [labels.setdefault(j, label(j)) for j in ids.flatten().to_pylist()]
                named = pa.ListArray.from_arrays(ids.offsets, pa.array(words, pa.string()))
                table = table.add_column(table.column_names.index(f"{side}_latents"), side, named)
            if writer is None:
                writer = pq.ParquetWriter(temp, table.schema, compression="zstd")
            writer.write_table(table)
        writer.close()


def write_uids(path: Path, uids: Sequence[str]) -> None:
    """DataComp's list of uids: ``u8,u8``, the halves of 128 bits, sorted."""
    pairs = np.array([(int(u[:16], 16), int(u[16:], 16)) for u in uids], dtype=DATACOMP)
    pairs.sort()
    with disk_errors(path), atomic_file(path) as temp, open(temp, "wb") as file:
        np.save(file, pairs)


def reshard(
    paths: Sequence[str], scored: Scored, kept: np.ndarray, out: Path, per_shard: int, compress: bool, progress: bool
) -> int:
    """Write the kept samples as ``out/kept-NNNNNN.tar``, and return how many there are. Members are unchanged.

    A key that would unpack elsewhere is written as ``safe_key`` says.
    A shard ends after ``per_shard`` samples, or before a key that it has already (data sets often number their keys
    anew in every tar). A shard that is there is whole, so a killed job goes on after the last one.
    """
    out.mkdir(parents=True, exist_ok=True)
    writer, keys, shard = None, set(), -1
    suffix = ".tar.gz" if compress else ".tar"
    bar = tqdm(desc="write shards", unit="sample", total=int(kept.sum()), disable=not progress)
    with bar, ExitStack() as stack:
        for path, lo, hi in zip(paths, scored.starts, scored.starts[1:], strict=False):
            wanted = set(scored.uids[lo:hi][kept[lo:hi]].tolist())
            for key, raw, _, spelled in groups(path, FaultLog()) if wanted else ():
                meta = parse_json(raw["json"])[0] if "json" in raw else None
                if (uid := make_uid("", shard_name(path), key, meta or {})) not in wanted:
                    continue
                wanted.discard(uid)
                key = safe_key(key)
                if shard < 0 or len(keys) == per_shard or key in keys:
                    stack.close()  # the shard that is full takes its name
                    shard, keys, writer = shard + 1, set(), None
                    if not (out / f"kept-{shard:06d}{suffix}").exists():
                        writer = ShardWriter(out, "kept", per_shard, compress)
                        writer.n = shard * per_shard  # it numbers its shards by this
                        stack.enter_context(writer)
                keys.add(key)
                if writer is not None:
                    writer.write(key, {spelled[field]: data for field, data in raw.items()})
                bar.update()
            if wanted:
                raise InputError(f"{path} has changed since it was scored: {len(wanted)} of its samples are not in it")
    return shard + 1


def spearman(columns: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """Rank correlation of every column with every other; NaN (left out) where one is constant."""
    names = [c for c, v in columns.items() if len(np.unique(v)) > 1]
    if not names:
        return {}
    ranks = average_ranks(torch.from_numpy(np.stack([columns[c] for c in names], 1).astype(np.float64)))
    table = torch.corrcoef(ranks.T).reshape(len(names), -1)
    return {a: {b: round(table[i, j].item(), 6) for j, b in enumerate(names)} for i, a in enumerate(names)}


def summary(values: np.ndarray) -> dict[str, Any]:
    """Mean, spread and quantiles of a column."""
    q = np.quantile(values, [0, 0.05, 0.25, 0.5, 0.75, 0.95, 1])
    names = ("min", "p05", "p25", "median", "p75", "p95", "max")
    return {"mean": float(values.mean()), "std": float(values.std())} | dict(zip(names, q.tolist(), strict=True))
