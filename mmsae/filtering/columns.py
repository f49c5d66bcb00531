"""The columns of a filter job's samples as files, so that the merge reads them in blocks and holds none as a whole."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import torch

from mmsae.files import disk_errors
from mmsae.metrics.statistics import spearman
from mmsae.partitions import order_statistics
from mmsae.shards.uids import hex_uids, uid_words
from mmsae.types import InputError

BLOCK = 1 << 18
"""Samples that are in memory at once, and that rank correlations are of where there are more."""
QUANTILES = {"min": 0.0, "p05": 0.05, "p25": 0.25, "median": 0.5, "p75": 0.75, "p95": 0.95, "max": 1.0}


class Column:
    """Numbers of all samples, one after the other in a file."""

    def __init__(self, path: Path, dtype: Any, n: int, width: int = 1) -> None:
        self.path, self.dtype, self.n, self.width = path, np.dtype(dtype), n, width

    def __len__(self) -> int:
        return self.n

    def part(self, lo: int, hi: int) -> np.ndarray:
        """Those of the samples ``lo`` to ``hi``: ``(hi - lo,)``, or ``(hi - lo, width)``."""
        step = self.dtype.itemsize * self.width
        found = np.fromfile(self.path, self.dtype, (hi - lo) * self.width, offset=lo * step)
        return found if self.width == 1 else found.reshape(-1, self.width)

    def blocks(self) -> Iterator[np.ndarray]:
        """All of them, in blocks."""
        return (self.part(lo, min(lo + BLOCK, self.n)) for lo in range(0, self.n, BLOCK))

    def whole(self) -> np.ndarray:
        """All of them in memory."""
        return self.part(0, self.n)

    @classmethod
    def write(cls, path: Path, dtype: Any, blocks: Iterator[np.ndarray]) -> Column:
        """Write the column that some blocks make."""
        n = 0
        with disk_errors(path), open(path, "wb") as file:
            for block in blocks:
                block.astype(dtype, copy=False).tofile(file)
                n += len(block)
        return cls(path, dtype, n)


class ScoredSamples(NamedTuple):
    """All samples of a job in the order of the tars, without their texts."""

    uids: Column  #: ``(N, 2)`` halves of the uids.
    numbers: dict[str, Column]  #: Words, scores, counts.
    sizes: list[int]  #: Samples of each part.

    @property
    def n(self) -> int:
        """Their number."""
        return len(self.uids)

    @property
    def starts(self) -> list[int]:
        """Number of the first sample of each part, and of all of them last."""
        return [0, *np.cumsum(self.sizes).tolist()]

    def uid_text(self) -> np.ndarray:
        """``(N,)`` str, all uids in memory."""
        return np.array(hex_uids(self.uids.whole()), dtype="U32")


def read_samples(parts: Sequence[Path], folder: Path) -> ScoredSamples:
    """The numbers of all parts, written into files of a folder, which is made anew.

    Raises:
        InputError: There is no usable sample at all.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    files: dict[str, Any] = {}
    types: dict[str, np.dtype] = {}
    sizes = []
    with disk_errors(folder):
        try:
            for path in parts:
                names = pq.read_schema(path).names
                if "words" not in names:  # no usable sample in this tar
                    sizes.append(0)
                    continue
                wanted = [n for n in names if _is_number(n)]
                table = pq.read_table(path, columns=["uid", *wanted])
                columns = {n: table[n].to_numpy() for n in wanted} | {"": uid_words(table["uid"])}
                for name, values in columns.items():
                    if name not in files:
                        files[name] = open(_file(folder, len(files)), "wb")
                        types[name] = values.dtype
                    values.astype(types[name], copy=False).tofile(files[name])
                sizes.append(len(table))
        finally:
            for file in files.values():
                file.close()
    if not files:
        raise InputError(f"not one usable sample in {len(parts)} shards")
    n = sum(sizes)
    found = {name: Column(_file(folder, i), types[name], n, 2 if not name else 1) for i, name in enumerate(files)}
    return ScoredSamples(found.pop(""), found, sizes)


def _file(folder: Path, i: int) -> Path:
    return folder / f"column-{i:03d}"


def _is_number(name: str) -> bool:
    texts = ("uid", "key", "shard", "caption")
    return name not in texts and not name.endswith(("_latents", "_strengths")) and "." not in name


class Summary:
    """Mean, spread and quantiles of a column, or of some samples of it; quantiles are exact.

    Args:
        column: The numbers.
        among: Which samples are meant, by a column of booleans; None: all.
    """

    def __init__(self, column: Column, among: Column | None = None) -> None:
        self.column, self.among = column, among

    def _blocks(self) -> Iterator[np.ndarray]:
        if self.among is None:
            yield from self.column.blocks()
            return
        for values, on in zip(self.column.blocks(), self.among.blocks(), strict=True):
            if on.any():
                yield values[on]

    @cached_property
    def moments(self) -> tuple[int, float, float]:
        """How many there are, their mean and their standard deviation."""
        n, mean, std = 0, 0.0, 0.0
        for values in self._blocks():
            m, own_mean, own_std = len(values), float(values.mean()), float(values.std())
            if n:
                apart, all_ = own_mean - mean, n + m
                std = ((n * std**2 + m * own_std**2 + apart**2 * n * m / all_) / all_) ** 0.5
                n, mean = all_, mean + apart * m / all_
            else:
                n, mean, std = m, own_mean, own_std
        return n, mean, std

    def to_dict(self) -> dict[str, float]:
        """``mean, std, min, p05, p25, median, p75, p95, max``."""
        n, mean, std = self.moments
        at = np.array(list(QUANTILES.values())) * (n - 1)
        lower = np.floor(at).astype(np.int64)
        ranks = np.stack([lower, np.minimum(lower + 1, n - 1)])
        ends = order_statistics(self._blocks, ranks.ravel()).reshape(2, -1)
        # numpy's interpolation, between the two numbers beside the place
        found = [np.quantile(ends[:, i], [at[i] - lower[i]])[0] for i in range(len(at))]
        return {"mean": mean, "std": std} | {k: float(v) for k, v in zip(QUANTILES, found, strict=True)}


def rank_correlations(samples: ScoredSamples) -> dict[str, dict[str, float]]:
    """Rank correlation of every column with every other; NaN (left out) where one is constant.

    Of more than about :data:`BLOCK` samples as many are taken, by a hash of their uids.
    """
    columns = _drawn(samples)
    names = [c for c, v in columns.items() if len(np.unique(v)) > 1]
    if not names:
        return {}
    values = torch.from_numpy(np.stack([columns[c] for c in names], 1).astype(np.float64))
    table = spearman(values, values)
    return {a: {b: round(table[i, j].item(), 6) for j, b in enumerate(names)} for i, a in enumerate(names)}


def _drawn(samples: ScoredSamples) -> Mapping[str, np.ndarray]:
    if samples.n <= BLOCK:
        return {c: v.whole() for c, v in samples.numbers.items()}
    below, some = np.uint64(2**64 * BLOCK // samples.n), {c: [] for c in samples.numbers}
    for uids, *values in zip(samples.uids.blocks(), *(v.blocks() for v in samples.numbers.values()), strict=True):
        # uids may be numbers in order: multiplying spreads them (Fibonacci hashing)
        on = (uids[:, 0] ^ uids[:, 1]) * np.uint64(0x9E3779B97F4A7C15) < below
        for c, v in zip(some, values, strict=True):
            some[c].append(v[on])
    return {c: np.concatenate(v) for c, v in some.items()}


def histogram(column: Column, kept: Column, ends: tuple[float, float], bins: int = 50) -> tuple[np.ndarray, np.ndarray]:
    """``(edges (bins + 1,), counts (2, bins))`` of the samples that are kept, and of the others."""
    edges = np.histogram_bin_edges(np.array(ends, column.dtype), bins)
    counts = np.zeros((2, bins), np.int64)
    for values, on in zip(column.blocks(), kept.blocks(), strict=True):
        for i, some in enumerate((values[on], values[~on])):
            counts[i] += np.histogram(some, edges)[0]
    return edges, counts
