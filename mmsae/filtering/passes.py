"""What each pass over shards computes of one tar, and how it lies in that tar's part file.

``fit`` keeps codes and embeddings, ``target`` adds up code mass, ``score`` makes the table of scores.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from mmsae.filtering.pair_weights import FitSample
from mmsae.filtering.scorers.clip import PairReader, Scorer
from mmsae.filtering.selection import Items
from mmsae.shards import FaultLog, draw
from mmsae.types import IMAGE, TEXT, Codes, ImageTextBatch

HELD_OUT = 0.2  # share of the target's items on which the match is tested
_META = b"mmsae"


def not_finite(batch: ImageTextBatch, tensors: Sequence[Tensor], log: FaultLog) -> Tensor:
    """``(B,)`` bool on the CPU, which samples are finite in all of some ``(B, ...)`` tensors; counts the others."""
    good = torch.stack([t.detach().cpu().reshape(len(t), -1).isfinite().all(1) for t in tensors]).all(0)
    for i in (~good).nonzero()[:, 0].tolist():
        log.add("not_finite", batch.shards[i], batch.keys[i], "the host or the SAE gave inf or nan")
    return good


def _pick(column: Sequence[str], good: Tensor) -> list[str]:
    return [v for v, ok in zip(column, good.tolist(), strict=True) if ok]


class FitPass:
    """Codes and embeddings of one tar; codes pooled over tokens alone where the host has no joint space."""

    def __init__(self, reader: PairReader | Scorer) -> None:
        self.reader = reader
        self.codes: dict[str, list[Codes]] = {IMAGE: [], TEXT: []}
        self.x: dict[str, list[Tensor]] = {IMAGE: [], TEXT: []}
        self.uids: list[str] = []
        self.captions: list[str] = []
        self.d_sae = 0

    def add(self, batch: ImageTextBatch, log: FaultLog) -> None:
        """Add a batch."""
        if isinstance(self.reader, PairReader):
            x, codes = self.reader.read(batch)
        else:
            x, codes = {}, self.reader.evidence(batch).codes
        self.d_sae = codes[IMAGE].d_sae
        good = not_finite(batch, [*x.values(), *(c.values for c in codes.values())], log)
        for m in (IMAGE, TEXT):
            c = codes[m]
            ids = None if c.indices is None else c.indices.cpu()[good]
            self.codes[m].append(c._replace(values=c.values.detach().cpu()[good], indices=ids, info=None))
            if m in x:
                self.x[m].append(x[m].cpu()[good])
        self.uids += _pick(batch.uids, good)
        self.captions += _pick(batch.captions, good)

    def part(self, log: FaultLog) -> bytes:
        """The part file."""
        faults = log.to_dict()
        if not self.uids:
            empty = Codes(torch.zeros(0, 1), torch.zeros(0, 1, dtype=torch.long), self.d_sae)
            return FitSample({IMAGE: empty, TEXT: empty}, {}, [], []).to_bytes(faults)
        codes = {m: Codes.stack(parts) for m, parts in self.codes.items()}
        x = {m: torch.cat(v) for m, v in self.x.items() if v}
        return FitSample(codes, x, self.uids, self.captions).to_bytes(faults)


class TargetPass:
    """Code mass of one tar of the target, apart for the items that the match is tested on."""

    def __init__(self, scorer: Scorer, modality: str) -> None:
        self.scorer, self.modality = scorer, modality
        self.mass: np.ndarray | None = None
        self.items = np.zeros(2, dtype=np.int64)

    def add(self, batch: ImageTextBatch, log: FaultLog) -> None:
        """Add a batch."""
        codes = self.scorer.evidence(batch).codes[self.modality]
        good = not_finite(batch, [codes.values], log).numpy()
        held = np.array([draw(u) < HELD_OUT for u in batch.uids])
        items = to_items(codes, np.array(batch.uids))
        if self.mass is None:
            self.mass = np.zeros((2, codes.d_sae))
        for i, rows in enumerate((good & ~held, good & held)):
            self.mass[i] += items.take(np.flatnonzero(rows)).mass(codes.d_sae)
            self.items[i] += rows.sum()

    def part(self, log: FaultLog) -> bytes:
        """The part file."""
        buffer = io.BytesIO()
        mass = np.zeros((2, 0)) if self.mass is None else self.mass
        np.savez(buffer, mass=mass, items=self.items, faults=np.array(json.dumps(log.to_dict())))
        return buffer.getvalue()


class Target(NamedTuple):
    """Concepts of the target set.

    Attributes:
        mass: ``(2, d_sae)`` code mass of the items to match, and of those the match is tested on.
        items: How many there are of each.
    """

    mass: np.ndarray
    items: list[int]

    @classmethod
    def read(cls, paths: Sequence[Path]) -> tuple[Target, list[dict[str, Any]]]:
        """The sum of several parts, and the faults of each."""
        mass: Any = 0
        items, faults = np.zeros(2, dtype=np.int64), []
        for path in paths:
            with np.load(path) as part:
                if part["mass"].shape[1]:
                    mass = mass + part["mass"]
                items += part["items"]
                faults.append(json.loads(str(part["faults"])))
        return cls(np.asarray(mass), items.tolist()), faults


class ScorePass:
    """The table of one tar.

    Args:
        scorer: Scores.
        modality: Whose codes to keep for choosing a set; empty: none.
        random: Seed of the score ``random``, where that is asked for.
    """

    def __init__(self, scorer: Scorer, modality: str = "", random: int | None = None) -> None:
        self.scorer, self.modality, self.random = scorer, modality, random
        self.tables: list[pa.Table] = []

    def add(self, batch: ImageTextBatch, log: FaultLog) -> None:
        """Add a batch."""
        scores, why = self.scorer.score(batch), self.scorer.evidence(batch)
        good = not_finite(batch, [scores[c] for c in self.scorer.columns], log)
        columns = {f: pa.array(_pick(getattr(batch, f + "s"), good), pa.string()) for f in ("uid", "key", "shard")}
        captions = _pick(batch.captions, good)
        columns["caption"] = pa.array(captions, pa.string())
        columns["words"] = pa.array([len(c.split()) for c in captions], pa.int32())
        numbers = {c: scores[c] for c in self.scorer.columns} | why.counts
        if self.random is not None:
            numbers["random"] = torch.tensor([draw(u, self.random) for u in batch.uids], dtype=torch.float64)
        columns |= {c: pa.array(v.detach().cpu()[good].float().numpy()) for c, v in numbers.items()}
        for side in ("text_only", "image_only"):
            latents, strengths = (t.detach().cpu()[good] for t in getattr(why, side))
            columns |= _lists(side, latents, strengths.float(), strengths > 0)
        if self.modality:
            codes = why.codes[self.modality]
            values = codes.values.detach().cpu()[good].float()
            ids = torch.arange(codes.d_sae).expand_as(values) if codes.indices is None else codes.indices.cpu()[good]
            columns |= _lists("code", ids, values, values != 0)
        self.tables.append(pa.table(columns))

    def part(self, log: FaultLog) -> bytes:
        """The part file, without any row where no sample of the tar was usable."""
        meta = {_META: json.dumps(log.to_dict()).encode()}
        table = pa.concat_tables(self.tables) if self.tables else pa.table({"uid": pa.array([], pa.string())})
        sink = pa.BufferOutputStream()
        pq.write_table(table.replace_schema_metadata(meta), sink, compression="zstd")
        return sink.getvalue().to_pybytes()


def _lists(name: str, ids: Tensor, values: Tensor, on: Tensor) -> dict[str, pa.Array]:
    """Two list columns of the entries that are on, row by row."""
    offsets = torch.nn.functional.pad(on.sum(1).cumsum(0), (1, 0)).int().numpy()
    lists = {"latents": ids[on].int().numpy(), "strengths": values[on].numpy()}
    return {f"{name}_{k}": pa.ListArray.from_arrays(offsets, v) for k, v in lists.items()}


def part_faults(path: Path) -> dict[str, Any]:
    """The faults of a part of the ``score`` pass."""
    return json.loads(pq.read_schema(path).metadata[_META])


def read_items(path: Path, bins: np.ndarray | None = None) -> Items:
    """The codes in a part of the ``score`` pass; ``bins (N,)`` are the samples' quality bins."""
    if "code_latents" not in pq.read_schema(path).names:
        none = np.zeros(0, dtype=np.int64)
        return Items(np.zeros(0, dtype="U32"), np.zeros(1, dtype=np.int64), none, np.zeros(0), none)
    table = pq.read_table(path, columns=["uid", "code_latents", "code_strengths"]).combine_chunks()
    ids, values = (table[c].combine_chunks() for c in ("code_latents", "code_strengths"))
    crow = ids.offsets.to_numpy().astype(np.int64)
    return Items(
        np.array(table["uid"].to_pylist(), dtype="U32"),
        crow - crow[0],
        ids.flatten().to_numpy().astype(np.int64),
        values.flatten().to_numpy().astype(np.float64),
        bins,
    )


def to_items(codes: Codes, uids: np.ndarray) -> Items:
    """Codes as numpy CSR."""
    v = codes.values.detach().cpu().double().numpy()
    ids = np.broadcast_to(np.arange(codes.d_sae), v.shape) if codes.indices is None else codes.indices.cpu().numpy()
    order = ids.argsort(1, kind="stable")
    ids, v = np.take_along_axis(ids, order, 1), np.take_along_axis(v, order, 1)
    on = v != 0
    return Items(uids, np.concatenate([[0], on.sum(1).cumsum()]), ids[on].astype(np.int64), v[on])


def make_pass(
    kind: str, scorer: Scorer | PairReader, modality: str, random: int | None = None
) -> FitPass | TargetPass | ScorePass:
    """A fresh pass over one tar."""
    if kind == "fit":
        return FitPass(scorer)
    return TargetPass(scorer, modality) if kind == "target" else ScorePass(scorer, modality, random)
