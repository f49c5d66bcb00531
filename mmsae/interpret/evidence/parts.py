"""What is made of one tar: pooled codes, counts and, where they are wanted, the codes of all rows of its items.

Two part files of a tar: ``codes`` (all items) and ``tokens`` (items in evidence, or all where that is small). Arrays go
to the disk batch by batch; latent after latent they are sorted in chunks, so that no more than a chunk is in memory.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmsae.activations.spool import Spool
from mmsae.interpret.evidence.folder import BINS, EDGES, map_arrays
from mmsae.interpret.evidence.reader import EvidenceReader
from mmsae.interpret.evidence.rows import BatchWords, FiredRows, Looked
from mmsae.jobs.units import TarWork
from mmsae.shards import FaultLog, draw
from mmsae.types import Faults, ImageTextBatch

CHUNK = 1 << 22  # pooled entries that are sorted at a time


class LatentCounts:
    """Running counts of the latents of one modality, see :class:`~mmsae.interpret.evidence.folder.LatentStats`."""

    def __init__(self, d_sae: int) -> None:
        self.fired_rows, self.fired_items = (torch.zeros(d_sae, dtype=torch.int64) for _ in range(2))
        self.sum, self.sum_sq = (torch.zeros(d_sae, dtype=torch.float64) for _ in range(2))
        self.max = torch.zeros(d_sae)
        self.histogram = torch.zeros(d_sae * BINS, dtype=torch.int64)
        self.rows, self.edges = 0, torch.from_numpy(EDGES)

    def add(self, fired: FiredRows, pooled: FiredRows) -> None:
        """Add the entries of a batch, of all rows and pooled."""
        d = len(self.max)
        value = fired.value.double()
        self.rows += fired.rows
        self.fired_rows += torch.bincount(fired.latent, minlength=d)
        self.fired_items += torch.bincount(pooled.latent, minlength=d)
        self.sum.index_add_(0, fired.latent, value)
        self.sum_sq.index_add_(0, fired.latent, value.square())
        self.max.scatter_reduce_(0, pooled.latent, pooled.value.abs(), "amax")
        self.histogram += torch.bincount(fired.latent * BINS + histogram_bin(fired.value), minlength=d * BINS)

    def part(self) -> dict[str, Tensor]:
        """Arrays for a part file; of the histogram what is not 0."""
        at = self.histogram.nonzero()[:, 0]
        names = ("fired_rows", "fired_items", "sum", "sum_sq", "max")
        return {n: getattr(self, n) for n in names} | {
            "hist_at": at, "hist_n": self.histogram[at], "rows": torch.tensor([self.rows])
        }  # fmt: skip

    def merge(self, part: Mapping[str, np.ndarray]) -> None:
        """Add what a part file holds."""
        for name in ("fired_rows", "fired_items", "sum", "sum_sq"):
            getattr(self, name).add_(torch.from_numpy(np.array(part[name])))
        self.max = torch.maximum(self.max, torch.from_numpy(np.array(part["max"])))
        self.histogram[torch.from_numpy(np.array(part["hist_at"]))] += torch.from_numpy(np.array(part["hist_n"]))
        self.rows += int(part["rows"][0])


def histogram_bin(value: Tensor) -> Tensor:
    """``(N,)`` bins of values by :data:`~mmsae.interpret.evidence.folder.EDGES`."""
    edges = torch.from_numpy(EDGES).to(value.device)
    return (torch.bucketize(value.double().abs(), edges, right=True) - 1).clamp(0, BINS - 1)


class CodesPart:
    """The ``codes`` part of one tar while it is written."""

    def __init__(self, path: Path, d_sae: int, modalities: Sequence[str]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.spool, self.d_sae, self.n = Spool(path), d_sae, 0
        self.counts = {m: LatentCounts(d_sae) for m in modalities}
        self.waiting: dict[str, list[list[Tensor]]] = {m: [] for m in modalities}
        self.places = dict.fromkeys(modalities, 1)
        self.grid = {m: [0, 0] for m in modalities}
        self.about: dict[str, list[str]] = {k: [] for k in ("uid", "key", "caption", "label")}
        self.shard = ""

    def add(self, looked: Looked) -> None:
        """Add a batch."""
        batch, marks, n = looked.batch, looked.marks, len(looked.batch.uids)
        for name, column in (("uid", batch.uids), ("key", batch.keys), ("caption", batch.captions),
                             ("label", marks.label)):  # fmt: skip
            self.about[name] += column
        self.shard = batch.shards[0] if n else self.shard
        self.spool.append("draw", torch.tensor([draw(u) for u in batch.uids], dtype=torch.float64))
        for name in ("dhash", "signature", "has_image", "text"):
            self.spool.append(name, getattr(marks, name))
        for m, x in looked.embed.items():
            self.spool.append(f"embed.{m}", x)
        for m, fired in looked.fired.items():
            pooled = fired.pooled(self.d_sae)
            self.counts[m].add(fired, pooled)
            self.places[m] = max(self.places[m], fired.places)
            self.grid[m] = torch.maximum(torch.tensor(self.grid[m]), fired.grid.amax(0)).tolist()
            self.spool.append(f"{m}.count", torch.bincount(pooled.item, minlength=n).int())
            for name in ("latent", "position", "value"):
                self.spool.append(f"{m}.{name}", _small(getattr(pooled, name)))
            self.waiting[m].append([pooled.item + self.n, pooled.latent, pooled.position, pooled.value])
            if sum(len(w[0]) for w in self.waiting[m]) > CHUNK:
                self._sort(m)
        self.n += n

    def _sort(self, m: str) -> None:
        """Write what waits, latent after latent, with the place of each latent's first entry."""
        if not self.waiting[m]:
            return
        item, latent, position, value = (torch.cat(t) for t in zip(*self.waiting[m], strict=True))
        order = latent.argsort(stable=True)
        start = torch.nn.functional.pad(torch.bincount(latent, minlength=self.d_sae).cumsum(0), (1, 0))
        self.spool.append(f"{m}.list.start", start[None])
        for name, t in (("item", item), ("position", position), ("value", value)):
            self.spool.append(f"{m}.list.{name}", _small(t[order]))
        self.waiting[m] = []

    def finish(self, faults: Faults) -> None:
        """Write the file."""
        for m, counts in self.counts.items():
            self._sort(m)
            for name, t in counts.part().items():
                self.spool.append(f"{m}.stats.{name}", t)
        said = {**self.about, "shard": self.shard, "faults": list(faults), "places": self.places, "grid": self.grid}
        self.spool.append("about", torch.frombuffer(bytearray(json.dumps(said).encode()), dtype=torch.uint8))
        self.spool.finish()


class TokensPart:
    """The ``tokens`` part of one tar while it is written: all rows of some items, their thumbnails and views."""

    def __init__(self, path: Path, modalities: Sequence[str]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.spool, self.modalities = Spool(path), modalities

    def add(self, looked: Looked, first: int, keep: Tensor) -> None:
        """Add those items of a batch that are kept ``(n,) bool``; ``first`` is the number of its first in the tar."""
        at = keep.nonzero()[:, 0]
        self.spool.append("item", (at + first).int())
        small = [looked.marks.thumbnail[i] for i in at.tolist()]
        self.spool.append("thumbnail_size", torch.tensor([len(b) for b in small], dtype=torch.int32))
        if joined := b"".join(small):
            self.spool.append("thumbnail", torch.frombuffer(bytearray(joined), dtype=torch.uint8))
        self.spool.append("view", looked.marks.view[at].float())
        for m, fired in looked.fired.items():
            f = fired.of(keep)
            self.spool.append(f"{m}.count", torch.bincount(f.item, minlength=len(at)).int())
            self.spool.append(f"{m}.grid", f.grid)
            for name in ("latent", "position", "value"):
                self.spool.append(f"{m}.{name}", _small(getattr(f, name)))
        for m, words in looked.words.items():
            self._add_words(m, words.of(keep), len(at))

    def _add_words(self, m: str, words: BatchWords, n: int) -> None:
        said = [w.encode() for w in words.text]
        self.spool.append(f"{m}.words.count", torch.bincount(words.item, minlength=n).int())
        self.spool.append(f"{m}.words.position", _small(words.position))
        self.spool.append(f"{m}.words.size", torch.tensor([len(w) for w in said], dtype=torch.int32))
        if joined := b"".join(said):
            self.spool.append(f"{m}.words.bytes", torch.frombuffer(bytearray(joined), dtype=torch.uint8))

    def finish(self) -> None:
        """Write the file."""
        self.spool.append("done", torch.ones(1, dtype=torch.uint8))
        self.spool.finish()


class TarParts(NamedTuple):
    """The parts of one tar and one SAE while they are written."""

    codes: CodesPart | None  #: The ``codes`` part; None: it is there.
    tokens: TokensPart | None  #: The ``tokens`` part; None: it is made later.
    wanted: Tensor | None  #: Which of the tar's items are in evidence; None: all.

    def add(self, looked: Looked, first: int) -> None:
        """Add a batch; ``first`` is the number of its first item in the tar."""
        n = len(looked.batch.uids)
        if self.codes is not None:
            self.codes.add(looked)
        if self.tokens is not None:
            keep = torch.ones(n, dtype=torch.bool) if self.wanted is None else self.wanted[first : first + n]
            self.tokens.add(looked, first, keep)

    def finish(self, faults: Faults) -> None:
        """Write the files; where the ``codes`` are there, the ``tokens`` that were made with them are, too."""
        if self.tokens is not None:
            self.tokens.finish()
        if self.codes is not None:
            self.codes.finish(faults)

    def close(self) -> None:
        """Let go of the files."""
        for part in (self.codes, self.tokens):
            if part is not None:
                part.spool.close()


class EvidenceTar(TarWork):
    """What is made of one tar in a pass.

    Args:
        reader: Host and SAEs.
        parts: ``{number of the SAE: what is written of it}``; the host reads a batch once for all.
    """

    def __init__(self, reader: EvidenceReader, parts: Mapping[int, TarParts]) -> None:
        self.reader, self.parts, self.n = reader, dict(parts), 0

    def add(self, batch: ImageTextBatch, log: FaultLog) -> None:
        found = self.reader.look(batch, log, self.parts)
        n = max((len(looked.batch.uids) for looked in found.values()), default=0)  # the same items of every SAE
        for i, looked in found.items():
            if n:
                self.parts[i].add(looked, self.n)
        self.n += n

    def finish(self, faults: FaultLog) -> None:
        told = faults.take()
        for part in self.parts.values():
            part.finish(told)

    def close(self) -> None:
        for part in self.parts.values():
            part.close()


class ReadPart:
    """A part file in a map; what was never appended is empty."""

    def __init__(self, path: Path) -> None:
        self.arrays = map_arrays(path)

    def about(self) -> dict[str, Any]:
        """What is said of the tar."""
        return json.loads(self.arrays["about"].tobytes())

    def get(self, name: str, dtype: Any = np.int32) -> np.ndarray:
        """An array."""
        return self.arrays.get(name, np.zeros(0, dtype))

    def stats(self, modality: str) -> dict[str, np.ndarray]:
        """The counts of a modality."""
        head = f"{modality}.stats."
        return {k.removeprefix(head): v for k, v in self.arrays.items() if k.startswith(head)}


def _small(t: Tensor) -> Tensor:
    return t if t.is_floating_point() else t.int()
