"""The passes of ``mmsae filter`` over shards: what each makes of one tar, and how that lies in the tar's part file.

``fit`` keeps codes and embeddings, ``target`` adds up code mass, ``score`` makes the table of scores.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from mmsae.files import atomic_file, disk_errors
from mmsae.filtering.pair_weights import FitSample
from mmsae.filtering.query import latent_columns
from mmsae.filtering.scorers.base import Scorer, ScorerSpec
from mmsae.filtering.scorers.clip import ClipScorer, PairReader
from mmsae.filtering.scorers.image import ImageScorer
from mmsae.filtering.selection import Items
from mmsae.jobs.estimate import estimate
from mmsae.jobs.units import Engine, Parts, Share, TarWork, Unit, Work, missing, work_tars
from mmsae.shards import FaultLog, UidList, UnitBatch, count_samples, draw, shard_name, unit_batches
from mmsae.types import IMAGE, TEXT, Codes, ImageTextBatch

HELD_OUT = 0.2  # share of the target's items on which the match is tested
META = b"mmsae"  # where a part says its faults
_reader: PairReader | None = None  # in a process that works and does not lead: host and SAE, loaded once for all passes


class Pass(NamedTuple):
    """One pass over shards; plain values, so that it travels to other processes."""

    kind: str  #: ``fit``, ``target`` or ``score``.
    paths: list[str]  #: All its tars.
    folder: str  #: Folder of the job's parts; those of the pass lie in one of its own there.
    spec: ScorerSpec  #: How to make what computes.
    modality: str  #: Whose codes to keep (``target`` and ``score``); empty: none.
    batch_size: int  #: Samples per batch.
    workers: int  #: Decoding processes per device.
    caption_field: str  #: Field of json with the caption.
    fault_limit: float  #: Share of dropped samples that is tolerated.
    progress: bool  #: Whether to print and show bars.
    latents: tuple[int, ...] = ()  #: Latents of a query, whose values are kept (``score``).
    keep: UidList | None = None  #: The uids that are used; None: all.

    @property
    def parts(self) -> Parts:
        """Its part files."""
        return Parts(Path(self.folder) / self.kind, self.paths)

    def run(self, engine: Engine, worker: Scorer | PairReader) -> list[Path]:
        """Write the parts that are missing; returns all of them.

        Raises:
            InputError: Too many samples are unusable, or what the scorer refuses.
        """
        parts = self.parts
        if todo := missing(engine, parts.tally):
            if self.progress and (own := engine.own(todo)):
                devices, paths = min(engine.size, len(own)), [self.paths[u] for u in own]

                def try_out(batch: ImageTextBatch) -> None:
                    # as another batch: a scorer keeps what it computed for the last
                    self._begin(worker, parts, parts.units[own[0]]).add(batch._replace(), FaultLog())

                done, whole = len(self.paths) - len(todo), worker.device != "cpu"

                def stream(some: Sequence[str], size: int) -> Iterator[UnitBatch]:
                    return self._batches(worker, some, 0, size)

                about = estimate(paths, done, stream, try_out, self.batch_size, self.workers, devices, whole)
                print(f"{self.kind}: {about}{about.takes(devices, worker.device)}", flush=True)
            engine.run(parts.tally, todo, self.worker(worker), _elsewhere, self)
        return parts.files()

    def _batches(
        self, worker: Scorer | PairReader, paths: Sequence[str], workers: int, size: int
    ) -> Iterator[UnitBatch]:
        reading = worker.host.reading((IMAGE,) if self.spec.images else (IMAGE, TEXT), self.spec.text)
        options = {"batch_size": size, "caption_field": self.caption_field, "unique": False, "keep": self.keep}
        options["pin_memory"] = worker.device == "cuda"
        return unit_batches(list(paths), workers=workers, **options, **reading)

    def _begin(self, worker: Scorer | PairReader, parts: Parts, unit: Unit) -> TarPass:
        if self.kind == "fit":
            return FitPass(parts, unit, worker)
        if self.kind == "target":
            return TargetPass(parts, unit, worker, self.modality)
        random = self.spec.seed if self.spec.score == "random" else None
        return ScorePass(parts, unit, worker, self.modality, random, self.latents)

    def worker(self, scorer: Scorer | PairReader) -> Work:
        """What writes the parts of one process's tars."""
        parts = self.parts
        unit_of = {u.path: u for u in parts.units}

        def begin(path: str) -> TarPass:
            return self._begin(scorer, parts, unit_of[path])

        def work(share: Share) -> None:
            paths = [self.paths[u] for u in share.units]
            stream = self._batches(scorer, paths, self.workers, self.batch_size)
            work_tars(stream, begin, share, self.kind, self.fault_limit, self.progress)

        return work


def _elsewhere(rank: int, job: Pass) -> Work:
    """What does a process's tars, in one that has loaded nothing, or only what an earlier pass needed."""
    global _reader
    if job.spec.pairs:
        _reader = _reader or PairReader(job.spec, rank)
        return job.worker(_reader if job.kind == "fit" else ClipScorer(_reader, job.spec.weights))
    if job.spec.images:
        return job.worker(ImageScorer(job.spec, rank))
    from mmsae.filtering.scorers.lvlm import SaeVScorer

    return job.worker(SaeVScorer(job.spec, rank))


def sample_tars(paths: Sequence[str], n: int, seed: int, keep: UidList | None = None) -> list[str]:
    """Whole tars with at least n samples together, drawn by a hash of seed and name, in the order of the job; with
    ``keep`` only those count that it lists.
    """
    chosen, have = set(), 0
    for path in sorted(paths, key=lambda p: (draw(shard_name(p), seed), p)):
        if have < n:
            chosen.add(path)
            have += count_samples(path, keep=keep)
    return [p for p in paths if p in chosen]


def not_finite(batch: ImageTextBatch, tensors: Sequence[Tensor], log: FaultLog) -> Tensor:
    """``(B,)`` bool on the CPU, which samples are finite in all of some ``(B, ...)`` tensors; counts the others."""
    good = torch.stack([t.detach().cpu().reshape(len(t), -1).isfinite().all(1) for t in tensors]).all(0)
    for i in (~good).nonzero()[:, 0].tolist():
        log.add("not_finite", batch.shards[i], batch.keys[i], "the host or the SAE gave inf or nan")
    return good


def _pick(column: Sequence[str], good: Tensor) -> list[str]:
    return [v for v, ok in zip(column, good.tolist(), strict=True) if ok]


class TarPass(TarWork):
    """What a pass makes of one tar."""

    def __init__(self, parts: Parts, unit: Unit) -> None:
        self.parts, self.unit = parts, unit

    def part(self, log: FaultLog) -> bytes:
        """The part file; ``log`` has the faults of the tar."""
        raise NotImplementedError

    def finish(self, faults: FaultLog) -> None:
        self.parts.write(self.unit, self.part(faults))


class FitPass(TarPass):
    """Codes and embeddings of one tar; codes pooled over tokens alone where the host has no joint space."""

    def __init__(self, parts: Parts, unit: Unit, reader: PairReader | Scorer) -> None:
        super().__init__(parts, unit)
        self.reader = reader
        self.codes: dict[str, list[Codes]] = {IMAGE: [], TEXT: []}
        self.x: dict[str, list[Tensor]] = {IMAGE: [], TEXT: []}
        self.uids: list[str] = []
        self.captions: list[str] = []
        self.d_sae = 0

    def add(self, batch: ImageTextBatch, log: FaultLog) -> None:
        if isinstance(self.reader, PairReader):
            x, codes = self.reader.read(batch)
        else:
            x, codes = {}, self.reader.reasons(batch).codes
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
        faults = log.to_dict()
        if not self.uids:
            empty = Codes(torch.zeros(0, 1), torch.zeros(0, 1, dtype=torch.long), self.d_sae)
            return FitSample({IMAGE: empty, TEXT: empty}, {}, [], []).to_bytes(faults)
        codes = {m: Codes.stack(parts) for m, parts in self.codes.items()}
        x = {m: torch.cat(v) for m, v in self.x.items() if v}
        return FitSample(codes, x, self.uids, self.captions).to_bytes(faults)


class TargetPass(TarPass):
    """Code mass of one tar of the target, apart for the items that the match is tested on."""

    def __init__(self, parts: Parts, unit: Unit, scorer: Scorer, modality: str) -> None:
        super().__init__(parts, unit)
        self.scorer, self.modality = scorer, modality
        self.mass: np.ndarray | None = None
        self.items = np.zeros(2, dtype=np.int64)

    def add(self, batch: ImageTextBatch, log: FaultLog) -> None:
        codes = self.scorer.reasons(batch).codes[self.modality]
        good = not_finite(batch, [codes.values], log).numpy()
        held = np.array([draw(u) < HELD_OUT for u in batch.uids])
        items = to_items(codes, np.array(batch.uids))
        if self.mass is None:
            self.mass = np.zeros((2, codes.d_sae))
        for i, rows in enumerate((good & ~held, good & held)):
            self.mass[i] += items.take(np.flatnonzero(rows)).mass(codes.d_sae)
            self.items[i] += rows.sum()

    def part(self, log: FaultLog) -> bytes:
        buffer = io.BytesIO()
        mass = np.zeros((2, 0)) if self.mass is None else self.mass
        np.savez(buffer, mass=mass, items=self.items, faults=np.array(json.dumps(log.to_dict())))
        return buffer.getvalue()


class TargetSet(NamedTuple):
    """Concepts of the target set."""

    mass: np.ndarray  #: ``(2, d_sae)`` code mass of the items to match, and of those the match is tested on.
    items: list[int]  #: How many there are of each.

    @classmethod
    def read(cls, paths: Sequence[Path]) -> tuple[TargetSet, list[dict[str, Any]]]:
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


class ScorePass(TarPass):
    """The table of one tar; without any row where no sample of the tar was usable.

    The codes of ``modality`` are kept for choosing a set (empty: none); ``random`` is the seed of that score, where it
    is asked for; ``latents`` are those of a query, of both modalities.
    """

    def __init__(
        self,
        parts: Parts,
        unit: Unit,
        scorer: Scorer,
        modality: str,
        random: int | None,
        latents: tuple[int, ...] = (),
    ) -> None:
        super().__init__(parts, unit)
        self.scorer, self.modality, self.random, self.latents = scorer, modality, random, latents
        self.tables: list[pa.Table] = []

    def add(self, batch: ImageTextBatch, log: FaultLog) -> None:
        scores, why = self.scorer.score(batch), self.scorer.reasons(batch)
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
            columns |= _lists("code", codes.ids().cpu()[good], values, values != 0)
        columns |= latent_columns(why.codes, self.latents, good)
        self.tables.append(pa.table(columns))

    def part(self, log: FaultLog) -> bytes:
        meta = {META: json.dumps(log.to_dict()).encode()}
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
    return json.loads(pq.read_schema(path).metadata[META])


def without_duplicates(path: Path, kept: np.ndarray, log: FaultLog) -> None:
    """Write a part of the ``score`` pass anew with some of its samples.

    It says in its faults, to which those of the log are added, which the others were, so that it loses none when this
    is done again.
    """
    faults = FaultLog(keep=10**6)
    faults.merge(FaultLog.from_dict(part_faults(path)).take())
    faults.merge(log.take())
    table = pq.read_table(path).filter(pa.array(kept)) if kept.any() else pa.table({"uid": pa.array([], pa.string())})
    table = table.replace_schema_metadata({META: json.dumps(faults.to_dict()).encode()})
    with disk_errors(path), atomic_file(path) as temp:
        pq.write_table(table, temp, compression="zstd")


def read_items(path: Path, bins: np.ndarray | None = None) -> Items:
    """The codes in a part of the ``score`` pass; ``bins (N,)`` are the samples' quality bins."""
    if "code_latents" not in pq.read_schema(path).names:
        none = np.zeros(0, dtype=np.int64)
        return Items(np.zeros(0, dtype="U32"), np.zeros(1, dtype=np.int64), none, np.zeros(0), none)
    table = pq.read_table(path, columns=["uid", "code_latents", "code_strengths"]).combine_chunks()
    ids, values = (table[c].combine_chunks() for c in ("code_latents", "code_strengths"))
    crow = ids.offsets.to_numpy().astype(np.int64)
    col, val = ids.flatten().to_numpy().astype(np.int64), values.flatten().to_numpy().astype(np.float64)
    return Items(np.array(table["uid"].to_pylist(), dtype="U32"), crow - crow[0], col, val, bins)


def code_entries(path: Path) -> int:
    """Number of entries of the codes in a part of the ``score`` pass, by its header."""
    meta = pq.read_metadata(path)
    groups = (meta.row_group(i) for i in range(meta.num_row_groups))
    columns = (g.column(i) for g in groups for i in range(g.num_columns))
    return sum(c.num_values for c in columns if c.path_in_schema.startswith("code_strengths"))


def to_items(codes: Codes, uids: np.ndarray) -> Items:
    """Codes as numpy CSR."""
    v = codes.values.detach().cpu().double().numpy()
    ids = np.broadcast_to(np.arange(codes.d_sae), v.shape) if codes.indices is None else codes.indices.cpu().numpy()
    order = ids.argsort(1, kind="stable")
    ids, v = np.take_along_axis(ids, order, 1), np.take_along_axis(v, order, 1)
    on = v != 0
    return Items(uids, np.concatenate([[0], on.sum(1).cumsum()]), ids[on].astype(np.int64), v[on])
