"""A store from tensors that are in memory already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mmsae.activations.spec import DTYPES
from mmsae.activations.writer import StoreWriter
from mmsae.types import InputError, Site, Tokens


def write_store(
    folder: str | Path,
    x: Mapping[str, Tensor | np.ndarray],
    uids: Sequence[str] | None = None,
    *,
    sites: Mapping[str, Site] | None = None,
    items: Mapping[str, Tensor] | None = None,
    keys: Sequence[str] | None = None,
    captions: Sequence[str] | None = None,
    grad: Mapping[str, Tensor] | None = None,
    dtype: str = "float32",
    rows_per_shard: int = 65536,
) -> Path:
    """Store tensors that are in memory already.

    Args:
        folder: The store; must be empty or absent.
        x: ``{modality: (N, d)}``, row i of every modality belonging to item i unless ``items`` is given.
        uids: The item ids; ``00...0``, ``00...1`` ... in 32 hex digits by default.
        sites: ``{modality: Site}``; an unnamed host by default.
        items: ``{modality: (N,)}`` item of each row, where items have several rows.
        keys: Keys of the items.
        captions: Captions of the items.
        grad: ``{modality: (N, d)}`` gradients of a loss at the rows.
        dtype: ``float32``, ``float16`` or ``bfloat16``.
        rows_per_shard: Items per file.

    Returns:
        The folder.
    """
    x = {m: torch.as_tensor(v) for m, v in x.items()}
    if sites is None:
        policy = "all" if items else "pooled"
        sites = {m: Site("", f"{m}.embed", tokens=policy, modality=m, width=v.shape[-1]) for m, v in x.items()}
    counts = {m: len(v) if items is None else int(items[m].max()) + 1 for m, v in x.items()}
    n = max(counts.values()) if uids is None else len(uids)
    if items is None and set(counts.values()) != {n}:
        raise InputError(
            f"{folder}: rows per modality are {counts} for {n} uids; a pooled store needs one row per item"
        )
    uids = [f"{i:032x}" for i in range(n)] if uids is None else list(uids)
    # lists, so that a slice of an absent column stays absent
    columns = [list(c) if c is not None else None for c in (keys, captions)]
    starts = range(0, max(n, 1), rows_per_shard)
    writer = StoreWriter(folder, sites, dtype=dtype, units=len(starts))
    if writer.finished or len(writer.missing()) < len(starts):
        raise InputError(
            f"{folder}: already holds an activation store; a store is never changed, choose another folder"
        )
    writer.needed = sum(v.numel() * DTYPES[dtype].itemsize for v in x.values())
    try:
        for u, lo in enumerate(starts):
            hi = min(lo + rows_per_shard, n)
            with writer.part(u) as part:
                part.add(_cut(x, items, grad or {}, lo, hi), uids[lo:hi], *(c[lo:hi] if c else None for c in columns))
        return writer.finish()
    finally:
        writer.discard()


def _cut(
    x: dict[str, Tensor], items: Mapping[str, Tensor] | None, grad: Mapping[str, Tensor], lo: int, hi: int
) -> Tokens:
    if items is None:
        return Tokens.pooled({m: v[lo:hi] for m, v in x.items()})._replace(grad={m: g[lo:hi] for m, g in grad.items()})
    keep = {m: (i >= lo) & (i < hi) for m, i in items.items()}
    kept = {m: i[keep[m]] - lo for m, i in items.items()}
    return Tokens({m: v[keep[m]] for m, v in x.items()}, kept, grad={m: g[keep[m]] for m, g in grad.items()})
