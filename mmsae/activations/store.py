"""Read an activation store: mapped files, rows by number or by uid, always float32 outside."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from mmsae.activations.spec import StoreSpec, shard_stem, site_label
from mmsae.activations.spool import file_hash, map_safetensors, release
from mmsae.files import nbytes
from mmsae.types import InputError, Site, Tokens

AUTO_VERIFY_BYTES = 2 * 10**9  # about two seconds of hashing


def not_finite(x: Tensor) -> Tensor:
    """``(n,)`` numbers of the rows of ``x (N, d)`` that hold NaN or infinity."""
    if torch.isfinite(x.sum(dtype=torch.float32)):  # a tenth of the time of asking every number
        return torch.empty(0, dtype=torch.long)
    return (~torch.isfinite(x).all(1)).nonzero()[:, 0]


class ActivationStore:
    """A finished store, opened for reading. Opening reads the spec and compares file sizes.

    Args:
        folder: What ``mmsae extract`` or :func:`mmsae.activations.write_store` wrote.
        verify: Whether to hash every file as well; None: if the store is below 2 GB, where that takes seconds.

    Raises:
        InputError: No store, unfinished, newer, damaged, or its content is not what its spec says.
    """

    def __init__(self, folder: str | Path, verify: bool | None = None) -> None:
        self.spec = StoreSpec.load(folder)
        self.folder = Path(folder)
        self.spec.check_sizes(folder)
        self._maps: dict[int, tuple[mmap.mmap, dict[str, Tensor]]] = {}
        self._row_item: dict[str, np.ndarray] = {}
        self._not_finite: dict[str, np.ndarray] = {}
        rows = {n: np.array([s.rows[n] for s in self.spec.shards]) for n in self.spec.sites}
        self._ends = {n: np.cumsum(r) for n, r in rows.items()}
        self._starts = {n: self._ends[n] - r for n, r in rows.items()}
        if verify or (verify is None and self.spec.nbytes < AUTO_VERIFY_BYTES):
            self.verify()

    def __reduce__(self) -> tuple[Any, ...]:
        return ActivationStore, (self.folder, False)  # maps do not travel to other processes

    def __len__(self) -> int:
        return self.spec.items

    def __repr__(self) -> str:
        return f"ActivationStore({str(self.folder)!r}: {self.spec.rows} rows, {self.spec.dtype})"

    @property
    def d_in(self) -> int | dict[str, int]:
        """Feature width: one number where the modalities agree, else one per modality."""
        return self.spec.d_in()

    @property
    def modalities(self) -> list[str]:
        """The modalities that are stored."""
        return self.spec.modalities

    @property
    def sites(self) -> dict[str, Site]:
        """``{modality: Site}``; stores with several sites per modality have them all in ``spec.sites``."""
        return {m: self.spec.sites[n] for m, n in self.spec.choose().items()}

    def verify(self) -> None:
        """Hash every file and compare with the spec.

        Raises:
            InputError: A file's content is not what was written.
        """
        self.spec.check_sizes(self.folder)
        for i, s in enumerate(self.spec.shards):
            for kind, expected in s.hashes.items():
                path = self.folder / f"{shard_stem(i)}.{kind}"
                actual = file_hash(path)
                if actual != expected:
                    raise InputError(
                        f"{path}: content hash is {actual[:16]}, the store's spec says {expected[:16]}: "
                        "the file was changed or damaged after it was written"
                    )

    def not_finite(self, name: str) -> np.ndarray:
        """``(n,)`` numbers of the rows of a site that hold NaN or infinity; reads the site, once."""
        if name not in self._not_finite:
            found, step = [], max(1, 2**22 // self.spec.sites[name].width)
            for i in range(len(self.spec.shards)):
                for j, part in enumerate(self._shard(i)[name].split(step)):
                    found.append(not_finite(part).numpy() + self._starts[name][i] + j * step)
                    release(self._maps[i][0])
            self.found_not_finite(name, np.concatenate(found) if found else np.zeros(0, np.int64))
        return self._not_finite[name]

    def found_not_finite(self, name: str, rows: np.ndarray) -> None:
        """Keep what :meth:`not_finite` would find, for whoever has read the site already."""
        self._not_finite[name] = rows

    def parts(self, name: str, column: str) -> Iterator[Tensor]:
        """A tensor of every shard in order, mapped; nothing of it stays in memory when the next one is asked for."""
        for i, shard in enumerate(self.spec.shards):
            if shard.rows[name]:  # an empty shard has no extra columns
                yield self._shard(i)[column]
                release(self._maps[i][0])

    def columns(self, name: str) -> Iterator[pa.ChunkedArray]:
        """The column ``uid``, ``key`` or ``caption`` of every shard, in order; nothing stays in memory."""
        for i in range(len(self.spec.shards)):
            yield pq.read_table(self.folder / f"{shard_stem(i)}.parquet", columns=[name])[name]

    @cached_property
    def uid_column(self) -> pa.ChunkedArray:
        """The uid of every item; stays in memory once it was asked for."""
        return pa.chunked_array([c for column in self.columns("uid") for c in column.chunks], pa.string())

    @property
    def uids(self) -> list[str]:
        """The uid of every item."""
        return self.uid_column.to_pylist()

    @property
    def keys(self) -> list[str]:
        """The key of every item in its source tar."""
        return [k for column in self.columns("key") for k in column.to_pylist()]

    @property
    def captions(self) -> list[str]:
        """The caption of every item; empty where there was none."""
        return [c for column in self.columns("caption") for c in column.to_pylist()]

    def load(
        self, site: str | Site | None = None, modality: str | None = None, uids: Sequence[str] | None = None
    ) -> Tensor:
        """All activations of one site.

        Args:
            site: Which site, where a modality has several (a :class:`Site`, its name or ``MODULE:IO[TOKENS]``).
            modality: ``image`` or ``text``; may be omitted for a one-modality store.
            uids: Only these items, in this order; all by default.

        Returns:
            ``(N, d)`` float32. For pooled sites row i is item i, of every modality.

        Raises:
            InputError: No such site or uid.
        """
        name = self.spec.resolve(site, modality)
        if uids is not None:
            return self.rows(name, self.rows_of_items(name, self.positions(uids)))
        out = torch.empty(self.spec.rows[name], self.spec.sites[name].width)
        at = 0
        for i, s in enumerate(self.spec.shards):
            out[at : at + s.rows[name]] = self._shard(i)[name]
            at += s.rows[name]
            release(self._maps[i][0])
        return out

    def rows(self, name: str, idx: np.ndarray | Tensor, dtype: torch.dtype | None = torch.float32) -> Tensor:
        """Rows by number.

        Args:
            name: Site name (the modality, where a modality has one site).
            idx: ``(n,)`` row numbers in any order; neighbouring numbers are read together.
            dtype: Type of the result; None: as stored.

        Returns:
            ``(n, d)``.
        """
        out = self._gather(name, name, np.asarray(idx))
        return out if dtype is None else out.to(dtype)

    def has(self, name: str, column: str) -> bool:
        """Whether a site has a column ``position``, ``special`` or ``grad`` beside its rows."""
        # an empty shard has no extra columns
        first = next((i for i, s in enumerate(self.spec.shards) if s.rows[name]), 0)
        return f"{name}.{column}" in self._shard(first)

    def gradients(self, names: Mapping[str, str], idx: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
        """``{modality: (n, d) gradients of rows, as stored}`` of the sites that have them."""
        return {m: self._gather(n, f"{n}.grad", np.asarray(idx[m])) for m, n in names.items() if self.has(n, "grad")}

    def tokens(
        self,
        names: Mapping[str, str],
        idx: Mapping[str, np.ndarray],
        uids: bool = True,
        x: Mapping[str, Tensor] | None = None,
        grad: Mapping[str, Tensor] | None = None,
    ) -> Tokens:
        """A batch of rows of several modalities.

        Args:
            names: ``{modality: site name}``.
            idx: ``{modality: (n,) row numbers}``.
            uids: Whether to look the uids up (for token sites: of the items that occur). Without them ``item`` is the
                number of the item in the store.
            x: The activations of these rows, if they have been read already.
            grad: Their gradients, if they have been read already.
        """
        x = {m: self.rows(n, idx[m]) for m, n in names.items()} if x is None else dict(x)
        grad = {m: g.float() for m, g in self.gradients(names, idx).items()} if grad is None else dict(grad)
        item = {m: torch.from_numpy(self.items_of_rows(n, np.asarray(idx[m]))) for m, n in names.items()}
        ids = None
        if uids:
            if all(self.spec.pooled(n) for n in names.values()):
                every = next(iter(item.values()))  # keep the order of the rows instead of sorting
                inverse = torch.arange(len(every)).repeat(len(item))
            else:
                every, inverse = torch.unique(torch.cat(list(item.values())), return_inverse=True)
            item = dict(zip(names, inverse.split([len(v) for v in item.values()]), strict=True))
            ids = self.uid_column.take(pa.array(every.numpy())).to_pylist()
        extra = {c: {} for c in ("position", "special")}
        for m, n in names.items():
            for column, kind in (("position", torch.int64), ("special", torch.bool)):
                if self.has(n, column):
                    extra[column][m] = self._gather(n, f"{n}.{column}", np.asarray(idx[m])).to(kind)
        return Tokens(x, item, ids, extra["position"] or None, extra["special"] or None, grad=grad or None)

    def positions(self, uids: Sequence[str]) -> np.ndarray:
        """``(len(uids),)`` item numbers; looks through the index, of which one shard is in memory at a time.

        Raises:
            InputError: A uid is not in the store.
        """
        where, at = dict.fromkeys(uids, -1), 0
        for column in self.columns("uid"):
            where |= {u: i for i, u in enumerate(column.to_pylist(), at) if u in where}
            at += len(column)
        if lost := next((u for u, i in where.items() if i < 0), None):
            raise InputError(f"{self.folder}: uid {lost} is not among the {len(self)} items of the store")
        return np.array([where[u] for u in uids], np.int64)

    def items_of_rows(self, name: str, idx: np.ndarray) -> np.ndarray:
        """``(n,)`` item number of each row."""
        return idx if self.spec.pooled(name) else self._row_items(name)[idx]

    def rows_of_items(self, name: str, items: np.ndarray) -> np.ndarray:
        """Row numbers of some items, item after item."""
        if self.spec.pooled(name):
            return items
        bounds = np.searchsorted(self._row_items(name), np.stack([items, items + 1]))
        lens = bounds[1] - bounds[0]
        return np.arange(lens.sum()) + np.repeat(bounds[0] - np.cumsum(lens) + lens, lens)

    def _row_items(self, name: str) -> np.ndarray:
        if name not in self._row_item:
            base = np.cumsum([0] + [s.items for s in self.spec.shards])
            parts = [self._shard(i)[f"{name}.item"].numpy() + base[i] for i in range(len(self.spec.shards))]
            self._row_item[name] = np.concatenate(parts)
        return self._row_item[name]

    def _gather(self, name: str, tensor: str, idx: np.ndarray) -> Tensor:
        shard = np.searchsorted(self._ends[name], idx, side="right")
        first = self._starts[name]
        which = np.unique(shard)
        if len(which) and which[-1] >= len(self.spec.shards):
            raise IndexError(f"{self.folder}: row {idx.max()} of {name}, which has {self.spec.rows[name]} rows")
        sample = self._shard(int(which[0]) if len(which) else 0)[tensor]
        out = torch.empty(len(idx), *sample.shape[1:], dtype=sample.dtype)
        for s in which.tolist():
            rows = self._shard(s)[tensor]
            if len(which) == 1:
                torch.index_select(rows, 0, torch.from_numpy(idx - first[s]), out=out)
            else:
                here = torch.from_numpy(np.flatnonzero(shard == s))
                out[here] = rows.index_select(0, torch.from_numpy(idx[here.numpy()] - first[s]))
            release(self._maps[s][0])
        return out

    def _shard(self, i: int) -> dict[str, Tensor]:
        if i not in self._maps:
            self._maps[i] = map_safetensors(self.folder / f"{shard_stem(i)}.safetensors")
        return self._maps[i][1]


def describe_store(folder: str | Path, verify: bool = False) -> dict[str, Any]:
    """What ``mmsae info`` says about a store; plain JSON values. ``verify`` hashes every file, however large the store.

    Raises:
        InputError: It is not a whole store.
    """
    store = ActivationStore(folder, verify=verify or None)
    spec, faults = store.spec, store.spec.faults
    checked = verify or spec.nbytes < AUTO_VERIFY_BYTES
    hosts = {s.hint or s.host[:12] or "unnamed" for s in spec.sites.values()}
    return {
        "kind": "activation store",
        "host": ", ".join(sorted(hosts)),
        "items": spec.items,
        "sites": {
            n: {"site": site_label(s), "modality": s.modality, "rows": spec.rows[n], "width": s.width, "host": s.host}
            for n, s in spec.sites.items()
        },
        "dtype": spec.dtype,
        "size": nbytes(spec.nbytes),
        "shards": len(spec.shards),
        "sources": [s.source for s in spec.shards if s.source],
        "faults": {"seen": faults.get("seen", 0), "counts": faults.get("counts", {})},
        "job": spec.job,
        "created_by": spec.created_by,
        "content_hash": spec.content_hash,
        "verified": "content" if checked else "file sizes",
    }
