"""One part of a store: the rows of one unit of work, in two files that appear only when they are whole."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from mmsae.cache.files import Spool, write_whole
from mmsae.cache.spec import DTYPES, has_item_column, shard_stem
from mmsae.files import disk_errors
from mmsae.types import Faults, InputError, Tokens

if TYPE_CHECKING:
    from mmsae.cache.writer import StoreWriter

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
        """Append one batch of ``len(uids)`` items.

        Args:
            tokens: Rows per site name; plain ``{site name: (B, d)}`` for pooled sites.
            uids: Sample ids; ``item`` of ``tokens`` points into them.
            keys: Keys in the source tar.
            captions: Raw captions.

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
        if dtype is torch.float16 and not stored.isfinite().all() and x.isfinite().all():
            raise InputError(
                f"site {name}: an activation of {x.abs().max():.3g} is beyond float16, which ends at "
                f"{torch.finfo(dtype).max:.0f}; store bfloat16 or float32"
            )
        self._spool.append(name, stored)

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
