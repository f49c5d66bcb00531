"""Several stores of the same items, read as one: joined by uid, never by position."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from torch import Tensor

from mmsae.activations.spec import ShardInfo, StoreSpec, digest, site_label
from mmsae.activations.store import ActivationStore
from mmsae.types import InputError, Site

_PART = 65536  # rows that are copied at once where they are not in the order of their store


class Held(NamedTuple):
    """Where a site lies."""

    store: ActivationStore  #: Which store.
    name: str  #: Its name there.
    rows: np.ndarray | None  #: ``(N,)`` its row there of every row here; None: the same.


class JoinedStores(ActivationStore):
    """Stores of several hosts or layers that hold the same items, in the order of the first store.

    Items that are not in all of them are left out. Sites have the names that one store would give them; those that
    several hosts call the same have ``@HOST`` behind it, twelve digits of its fingerprint.

    Args:
        folders: The stores.
        verify: As for one store.

    Attributes:
        left_out: ``{folder: items that are not in all stores}``.

    Raises:
        InputError: Two stores hold the same site, or there is no common item.
    """

    def __init__(self, folders: Sequence[str | Path], verify: bool | None = None) -> None:
        self.stores = [ActivationStore(folder, verify) for folder in folders]
        self.folder = Path(" and ".join(map(str, folders)))
        self._row_item: dict[str, np.ndarray] = {}
        self._not_finite: dict[str, np.ndarray] = {}
        self._at = self._common()
        n = len(self._at[0])
        self.left_out = {str(s.folder): len(s) - n for s in self.stores}
        if not n:
            raise InputError(f"the stores {self.folder} have no uid in common, so that nothing can be joined")
        self._held = {name: Held(s, own, self._rows(s, own, at)) for name, s, own, at in self._named()}
        self.spec = self._spec(n)

    def __reduce__(self) -> tuple[Any, ...]:
        return JoinedStores, ([s.folder for s in self.stores], False)

    def _common(self) -> list[np.ndarray]:
        """For every store, the items that all have, ``(n,)`` each, in equal order."""
        first, *others = self.stores
        at = [np.arange(len(first))]
        for store in others:
            if store.uid_column.equals(first.uid_column):
                at.append(at[0])
                continue
            found = pc.index_in(first.uid_column, value_set=store.uid_column.combine_chunks())
            at.append(pc.fill_null(found, -1).to_numpy().astype(np.int64))
        keep = np.logical_and.reduce([a >= 0 for a in at])
        return at if keep.all() else [a[keep] for a in at]

    def _named(self) -> Iterator[tuple[str, ActivationStore, str, np.ndarray]]:
        every = [
            (s, own, site, at)
            for s, at in zip(self.stores, self._at, strict=True)
            for own, site in s.spec.sites.items()
        ]
        modalities = Counter(site.modality for _, _, site, _ in every)
        labels = Counter((site.modality, site_label(site)) for _, _, site, _ in every)
        given: dict[str, Path] = {}
        for store, own, site, at in every:
            name = site.modality
            if modalities[site.modality] > 1:
                name += f"/{site_label(site)}"
            if labels[site.modality, site_label(site)] > 1:
                name += f"@{site.host[:12]}"
            if name in given:
                raise InputError(f"the stores {given[name]} and {store.folder} both hold {site}")
            given[name] = store.folder
            yield name, store, own, at

    @staticmethod
    def _rows(store: ActivationStore, name: str, at: np.ndarray) -> np.ndarray | None:
        if len(at) == len(store) and np.array_equal(at, np.arange(len(at))):
            return None
        if store.spec.pooled(name):
            return at
        return np.concatenate(
            [store.rows_of_items(name, part) for part in np.array_split(at, max(1, len(at) // _PART))]
        )

    def _spec(self, n: int) -> StoreSpec:
        sites: dict[str, Site] = {name: h.store.spec.sites[h.name] for name, h in self._held.items()}
        rows = {name: h.store.spec.rows[h.name] if h.rows is None else len(h.rows) for name, h in self._held.items()}
        dtypes = {s.spec.dtype for s in self.stores}
        shard = ShardInfo("", n, rows, {"safetensors": sum(s.spec.nbytes for s in self.stores)}, {})
        hashed = digest(json.dumps([s.spec.content_hash for s in self.stores]).encode())
        return StoreSpec(sites, dtypes.pop() if len(dtypes) == 1 else "float32", [shard], content_hash=hashed)

    def verify(self) -> None:
        """Hash every file of every store."""
        for store in self.stores:
            store.verify()

    def has(self, name: str, column: str) -> bool:
        held = self._held[name]
        return held.store.has(held.name, column)

    def not_finite(self, name: str) -> np.ndarray:
        if name not in self._not_finite:
            held = self._held[name]
            bad = held.store.not_finite(held.name)
            self.found_not_finite(name, bad if held.rows is None else np.flatnonzero(np.isin(held.rows, bad)))
        return self._not_finite[name]

    def parts(self, name: str, column: str) -> Iterator[Tensor]:
        held = self._held[name]
        if held.rows is None:
            yield from held.store.parts(held.name, held.name + column.removeprefix(name))
            return
        for lo in range(0, len(held.rows), _PART):
            yield self._gather(name, column, np.arange(lo, min(lo + _PART, len(held.rows))))

    def columns(self, name: str) -> Iterator[pa.ChunkedArray]:
        first = self.stores[0]
        yield pa.chunked_array([c for column in first.columns(name) for c in column.chunks], pa.string()).take(
            self._at[0]
        )

    @cached_property
    def uid_column(self) -> pa.ChunkedArray:
        """The uid of every item."""
        return self.stores[0].uid_column.take(self._at[0])

    def load(
        self, site: str | Site | None = None, modality: str | None = None, uids: Sequence[str] | None = None
    ) -> Tensor:
        name = self.spec.resolve(site, modality)
        items = None if uids is None else self.positions(uids)
        return self.rows(name, np.arange(self.spec.rows[name]) if items is None else self.rows_of_items(name, items))

    def _row_items(self, name: str) -> np.ndarray:
        if name not in self._row_item:
            held = self._held[name]
            of = held.store._row_items(held.name)
            if held.rows is not None:
                here = np.full(len(held.store), -1)
                here[self._at[self.stores.index(held.store)]] = np.arange(len(self))
                of = here[of[held.rows]]
            self._row_item[name] = of
        return self._row_item[name]

    def _gather(self, name: str, tensor: str, idx: np.ndarray) -> Tensor:
        held = self._held[name]
        idx = idx if held.rows is None else held.rows[idx]
        return held.store._gather(held.name, held.name + tensor.removeprefix(name), idx)


def open_stores(folders: str | Path | Sequence[str | Path], verify: bool | None = None) -> ActivationStore:
    """One store, or several of the same items as one."""
    if isinstance(folders, (str, Path)):
        return ActivationStore(folders, verify)
    return JoinedStores(folders, verify) if len(folders) > 1 else ActivationStore(folders[0] if folders else "", verify)
