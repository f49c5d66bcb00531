"""Write an activation store unit by unit: every part is whole or absent, and ``spec.json`` comes last."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

import mmsae
from mmsae.activations.spec import (
    DTYPES,
    JOB_FILE,
    SPEC_FILE,
    ShardInfo,
    StoreSpec,
    digest,
    has_item_column,
    shard_stem,
)
from mmsae.activations.spool import Spool
from mmsae.activations.uids import find_duplicate
from mmsae.files import disk_errors, write_whole
from mmsae.jobs.folder import LOCK, JobFolder, same_job
from mmsae.jobs.tally import FAILED, UNITS, Tally
from mmsae.types import Faults, InputError, Site, Tokens

_META = b"mmsae"


class PartWriter:
    """One part of a store; made by :meth:`StoreWriter.part`."""

    def __init__(self, store: StoreWriter, unit: int, source: str) -> None:
        self.store, self.source = store, source
        stem = store.folder / shard_stem(unit)
        self.index_file = store.index_file(unit)
        self._cells: dict[str, list[str]] = {"uid": [], "key": [], "caption": []}
        self._faults: list[Faults] = []
        with disk_errors(store.folder, store.needed):
            self._spool = Spool(stem.with_name(f"{stem.name}.safetensors"))

    def add(
        self,
        tokens: Tokens | Mapping[str, Tensor],
        uids: Sequence[str],
        keys: Sequence[str] | None = None,
        captions: Sequence[str] | None = None,
    ) -> None:
        """Append one batch of ``len(uids)`` items; plain ``{site name: (B, d)}`` for pooled sites.

        Raises:
            InputError: Widths, counts or the range of the dtype disagree with the data, or the disk is full.
        """
        if not isinstance(tokens, Tokens):
            tokens = Tokens.pooled(dict(tokens), list(uids))
        if set(tokens.x) != set(self.store.sites):
            raise InputError(
                f"{self.source}: rows for sites {sorted(tokens.x)}, the store has {sorted(self.store.sites)}"
            )
        base = len(self._cells["uid"])
        with disk_errors(self.store.folder, max(self.store.needed, self._spool.size)):
            for name in self.store.sites:
                self._append(name, tokens, len(uids), base)
        blank = [""] * len(uids)
        for column, cells in zip(self._cells, (uids, keys or blank, captions or blank), strict=True):
            self._cells[column] += cells

    def _append(self, name: str, tokens: Tokens, n_items: int, base: int) -> None:
        site, dtype = self.store.sites[name], DTYPES[self.store.dtype]
        x, item = tokens.x[name].detach().cpu(), tokens.item[name].cpu()
        if x.ndim != 2 or x.shape[1] != site.width:
            raise InputError(f"site {name}: activations have shape {tuple(x.shape)}, its width is {site.width}")
        if has_item_column(site):
            order = item.argsort(stable=True)  # rows of an item lie together, so that one item is one slice
            x, item = x[order], item[order]
            self._spool.append(f"{name}.item", (item + base).int())
            for column, kind in (("position", torch.int32), ("special", torch.uint8)):
                value = getattr(tokens, column)
                if value is not None and name in value:
                    self._spool.append(f"{name}.{column}", value[name].cpu()[order].to(kind))
        elif len(x) != n_items:
            raise InputError(f"site {name}: {len(x)} rows for {n_items} items, a pooled site has one row per item")
        stored = x.to(dtype)
        if tokens.grad is not None and name in tokens.grad:
            grad = tokens.grad[name].detach().cpu()
            if dtype is torch.float16:
                raise InputError(f"site {name}: gradients underflow in float16; store bfloat16 or float32")
            if grad.shape != x.shape:
                raise InputError(f"site {name}: gradients have shape {tuple(grad.shape)}, activations {tuple(x.shape)}")
            self._spool.append(f"{name}.grad", (grad[order] if has_item_column(site) else grad).to(dtype))
        if dtype is torch.float16 and not stored.isfinite().all() and x.isfinite().all():
            raise InputError(
                f"site {name}: an activation of {x.abs().max():.3g} is beyond float16, which ends at "
                f"{torch.finfo(dtype).max:.0f}; store bfloat16 or float32"
            )
        self._spool.append(name, stored)

    def put(self, name: str, rows: Tensor) -> None:
        """Append rows of one tensor of the file as they are."""
        with disk_errors(self.store.folder, max(self.store.needed, self._spool.size)):
            self._spool.append(name, rows)

    def put_items(self, cells: Mapping[str, Sequence[str]]) -> None:
        """Append uids, keys and captions, to which :meth:`put` gives the rows."""
        for column, values in self._cells.items():
            values += cells[column]

    def fault(self, faults: Faults) -> None:
        """Record what was dropped while this part was read."""
        self._faults.append(faults)

    def commit(self) -> None:
        """Write the two files of this part under their final names, the index last."""
        for name, site in self.store.sites.items():
            if name not in self._spool.columns:  # not one good sample in this tar
                none = torch.zeros(0, site.width)
                item = {name: torch.zeros(0, dtype=torch.int64)}
                self._append(name, Tokens({name: none}, item), 0, 0)
        counts = sum((Counter(f.counts) for f in self._faults), Counter())
        examples = [list(e) for f in self._faults for e in f.examples][:100]
        with disk_errors(self.store.folder, max(self.store.needed, self._spool.size)):
            rows = {n: self._spool.rows[n] for n in self.store.sites}
            meta = {
                "source": self.source,
                "items": len(self._cells["uid"]),
                "rows": rows,
                "safetensors": self._spool.finish(),
                "faults": [sum(f.seen for f in self._faults), dict(sorted(counts.items())), examples],
            }
            schema = pa.schema([(c, pa.string()) for c in self._cells], {_META: json.dumps(meta).encode()})
            sink = pa.BufferOutputStream()
            pq.write_table(pa.table(self._cells, schema), sink, compression="zstd")
            write_whole(self.index_file, sink.getvalue().to_pybytes())
        self.index_file.with_name(self.index_file.name + FAILED).unlink(missing_ok=True)

    def close(self) -> None:
        """Remove temporary files."""
        self._spool.close()

    @property
    def uids(self) -> list[str]:
        """The uids added so far."""
        return self._cells["uid"]

    @property
    def keys(self) -> list[str]:
        """Their keys."""
        return self._cells["key"]


def part_meta(index_file: Path) -> dict[str, Any]:
    """What a finished part says about itself, from the header of its parquet file."""
    return json.loads(pq.read_schema(index_file).metadata[_META])


class StoreWriter:
    """A store that is being written. Units may be written in any order and by several processes, one each.

    Args:
        folder: The store; made if absent.
        sites: ``{site name: Site}`` (:func:`mmsae.activations.spec.name_sites`).
        dtype: ``float32`` (default: exact), ``float16`` or ``bfloat16`` (half the disk; 11 and 8 significant bits).
        units: Number of parts the finished store has.
        job: What identifies the job (plain JSON values). A folder begun by another job is refused.

    Attributes:
        finished: The folder already holds the finished store of this very job.
        needed: Bytes still to be written, as far as the caller knows; only used in messages.

    Raises:
        InputError: The folder holds something else.
    """

    def __init__(
        self,
        folder: str | Path,
        sites: Mapping[str, Site],
        *,
        dtype: str = "float32",
        units: int = 1,
        job: Mapping[str, Any] | None = None,
    ) -> None:
        if dtype not in DTYPES:
            raise InputError(f"dtype {dtype}: a store holds one of {', '.join(DTYPES)}")
        for name, site in sites.items():
            if site.width < 1:
                raise InputError(f"site {name}: its width is {site.width}, a stored site needs one of at least 1")
        self.folder, self.sites, self.dtype, self.units = Path(folder), dict(sites), dtype, units
        self.job = json.loads(json.dumps(dict(job or {})))
        self.needed = 0
        self.finished = self._open()

    def _open(self) -> bool:
        ours = {"sites": _identity(self.sites), "dtype": self.dtype, "units": self.units, "job": self.job}
        if (self.folder / SPEC_FILE).exists():
            spec = StoreSpec.load(self.folder)
            theirs = {"sites": _identity(spec.sites), "dtype": spec.dtype, "units": len(spec.shards), "job": spec.job}
            same_job(theirs, ours, f"{self.folder} holds the finished store")
            spec.check_sizes(self.folder)
            self._clean()
            return True
        # no process leads: each that works on the store shares the lock
        self._lock = JobFolder(self.folder, ours, "mmsae extract").begin()
        fcntl.flock(self._lock, fcntl.LOCK_SH)
        return False

    def done(self, unit: int) -> bool:
        """Whether this part is written."""
        # the parquet file is written after the safetensors file and so stands for both
        return self.finished or self.index_file(unit).exists()

    def index_file(self, unit: int) -> Path:
        """The parquet file of a part."""
        return self.folder / f"{shard_stem(unit)}.parquet"

    def source(self, unit: int) -> str:
        """What a finished part was made from, for messages."""
        return part_meta(self.index_file(unit))["source"] or shard_stem(unit)

    @contextmanager
    def part(self, unit: int, source: str = "") -> Iterator[PartWriter]:
        """One unit of work: committed when the block ends well, without trace when it raises.

        Raises:
            InputError: The disk is full, or another process writes this part.
        """
        part = self.open_part(unit, source)
        try:
            yield part
            part.commit()
        finally:
            part.close()

    def open_part(self, unit: int, source: str = "") -> PartWriter:
        """A part whose :meth:`PartWriter.commit` and :meth:`PartWriter.close` the caller calls."""
        return PartWriter(self, unit, source)

    @property
    def tally(self) -> Tally:
        """Which units are written."""
        files = [self.index_file(u).name for u in range(self.units)]
        return Tally(self.folder, [shard_stem(u) for u in range(self.units)], files)

    def missing(self) -> list[int]:
        """Units not yet written."""
        return [u for u in range(self.units) if not self.done(u)]

    def written(self) -> dict[Path, str]:
        """``{parquet file: what it was made from}`` of the parts that are written."""
        return {self.index_file(u): self.source(u) for u in range(self.units) if self.done(u)}

    def faults(self) -> list[Faults]:
        """The faults of every part that is written."""
        metas = (part_meta(self.index_file(u)) for u in range(self.units) if self.done(u))
        return [Faults.read(m["faults"]) for m in metas]

    def finish(self) -> Path:
        """The merge: check all parts, then write ``spec.json``. Any process may do it, several may do it at once.

        Raises:
            InputError: A part is missing, a uid occurs twice, or there is no item at all.
        """
        if self.finished:
            return self.folder
        if (self.folder / SPEC_FILE).exists():  # another process of this job was faster
            self.finished = True
            return self.folder
        if missing := self.missing():
            raise InputError(f"{self.folder}: {self.units - len(missing)} of {self.units} parts are written")
        files = [self.index_file(u) for u in range(self.units)]
        metas = [part_meta(f) for f in files]
        if dup := find_duplicate(files, [self.source(u) for u in range(self.units)], self.folder):
            raise InputError(f"{self.folder}: {dup}; uids must differ, remove one of the two samples")
        shards, counts, seen, examples = [], Counter(), 0, []
        for path, meta in zip(files, metas, strict=True):
            data = path.read_bytes()
            size, hashed = meta["safetensors"]
            sizes = {"safetensors": size, "parquet": len(data)}
            hashes = {"safetensors": hashed, "parquet": digest(data)}
            shards.append(ShardInfo(meta["source"], meta["items"], meta["rows"], sizes, hashes))
            seen, counts = seen + meta["faults"][0], counts + Counter(meta["faults"][1])
            examples += meta["faults"][2]
        faults = {"seen": seen, "counts": dict(sorted(counts.items())), "examples": examples[:100]}
        spec = StoreSpec(self.sites, self.dtype, shards, self.job, faults, f"mmsae {mmsae.__version__}")
        if not spec.items:
            raise InputError(f"{self.folder}: not one usable sample in {self.units} shards, {seen} were looked at")
        spec.check_sizes(self.folder)
        with disk_errors(self.folder, 1 << 16):
            write_whole(self.folder / SPEC_FILE, spec.to_json().encode())
        self._clean()
        self.finished = True
        return self.folder

    def discard(self) -> None:
        """Remove what this job wrote, unless it is a finished store or another process is working on it."""
        if self.finished or (self.folder / SPEC_FILE).exists():
            return
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        for pattern in ("shard-*.parquet", "shard-*.safetensors"):  # the index first: it vouches for the other
            for p in self.folder.glob(pattern):
                p.unlink(missing_ok=True)
        self._clean()
        if not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _clean(self) -> None:
        for pattern in (JOB_FILE, ".*.tmp", UNITS, f"*{FAILED}", f"{LOCK}*"):
            for p in self.folder.glob(pattern):
                shutil.rmtree(p, ignore_errors=True) if p.is_dir() else p.unlink(missing_ok=True)


def _identity(sites: dict[str, Site]) -> dict[str, Any]:
    # where a host can be loaded from is not what it is
    return {n: {k: v for k, v in s.to_dict().items() if k != "hint"} for n, s in sites.items()}
