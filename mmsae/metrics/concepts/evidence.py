"""The samples that each latent answers to most: a streaming top-n per latent, in memory linear in latents times n.

The result depends only on the set of samples seen, not on batches, their order or ranks; equal values go by uid.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from mmsae.types import Codes, InputError


def pack_uids(uids: Sequence[str]) -> Tensor:
    """``(N, 2)`` int64: the 128 bits of 32-hex uids, such that comparing the rows as numbers orders the uids.

    Raises:
        InputError: A uid is not 32 hex digits.
    """
    try:
        raw = bytes.fromhex("".join(uids))
    except ValueError:
        raw = b""
    if len(raw) != 16 * len(uids) or any(len(u) != 32 for u in uids):
        bad = next(u for u in uids if len(u) != 32 or set(u.lower()) - set("0123456789abcdef"))
        raise InputError(f"uid {bad!r} is not 32 hex digits")
    words = np.frombuffer(raw, dtype=">u8").astype(np.uint64).reshape(-1, 2) ^ np.uint64(1 << 63)
    return torch.from_numpy(words.view(np.int64).copy())


def unpack_uids(packed: Tensor) -> list[str]:
    """The uids of ``(N, 2)`` packed ones; see :func:`pack_uids`."""
    words = np.ascontiguousarray(packed.cpu().numpy()).view(np.uint64) ^ np.uint64(1 << 63)
    text = words.astype(">u8").tobytes().hex()
    return [text[i : i + 32] for i in range(0, len(text), 32)]


def text_keys(captions: Sequence[str]) -> Tensor:
    """``(N,)`` int64 hashes, equal where captions are (up to 64-bit collisions): the ``key`` of :class:`TopN`."""
    digests = b"".join(hashlib.blake2b(c.encode(), digest_size=8).digest() for c in captions)
    return torch.from_numpy(np.frombuffer(digests, dtype=np.int64).copy())


class TopTable(NamedTuple):
    """Top samples of every latent in one modality."""

    #: ``(d_sae, n)`` float32 activations, the largest absolute values first, with their signs where codes have signs; 0
    #: where a latent has fewer than n samples
    values: Tensor
    ids: Tensor  #: ``(d_sae, n, 2)`` int64 packed uids; meaningless where the value is 0
    n_fired: Tensor  #: ``(d_sae,)`` int64 rows in which the latent fired
    mean_active: Tensor  #: ``(d_sae,)`` float64 mean absolute value over those rows; 0 for latents that never fired
    rows: int  #: Rows seen
    #: ``(d_sae, n, e)`` int64 what was said of each sample beside its uid: the position of a token, say
    extra: Tensor | None = None

    def top(self, latent: int) -> list[tuple[str, float]]:
        """``(uid, value)`` of a latent's top samples, best first; empty for a dead latent."""
        v = self.values[latent]
        on = v != 0
        return list(zip(unpack_uids(self.ids[latent][on]), v[on].tolist(), strict=True))

    def rows_in(self, uids: Sequence[str]) -> Tensor:
        """``(d_sae, n)`` int64 position of every top sample in ``uids``; -1 for none or not among them."""
        where = {u.lower(): i for i, u in enumerate(uids)}
        out = torch.full(self.values.shape, -1)
        on = (self.values != 0).cpu()
        out[on] = torch.tensor([where.get(u, -1) for u in unpack_uids(self.ids.cpu()[on])], dtype=torch.long)
        return out


def lexsort(*columns: Tensor) -> Tensor:
    """``(M,)`` order that sorts by the first column, ties by the second, and so on."""
    order = torch.arange(len(columns[0]), device=columns[0].device)
    for c in reversed(columns):
        order = order[c[order].argsort(stable=True)]
    return order


def run_starts(*columns: Tensor) -> Tensor:
    """``(M,)`` bool, True where a row of sorted columns differs from the row before."""
    new = torch.zeros(len(columns[0]), dtype=torch.bool, device=columns[0].device)
    new[:1] = True
    for c in columns:
        new[1:] |= c[1:] != c[:-1]
    return new


def places(key: Tensor) -> Tensor:
    """``(M,)`` place of every row in its run of equal keys, from 0; ``key`` is sorted."""
    i = torch.arange(len(key), device=key.device)
    return i - torch.where(run_starts(key), i, 0).cummax(0).values if len(i) else i


class TopN(Metric):
    """Streaming top-n samples per latent of one modality, with ``extra`` integers beside each uid.

    What is ranked is the absolute value: the two poles of a signed latent share a list, told apart by the signs of the
    values. Every distinct ``key`` appears once per latent, with its highest value: tokens of one sample, a sample seen
    twice and, where keys are caption hashes, equal captions do not fill the list. Rows with activation 0 are never
    listed.
    """

    full_state_update = False

    def __init__(self, d_sae: int, n: int = 10, extra: int = 0, **kwargs):
        super().__init__(**kwargs)
        self.d_sae, self.n_top = d_sae, n
        self.add_state("values", torch.zeros(d_sae, n), dist_reduce_fx=None)
        # uid words, key, extra
        self.add_state("ids", torch.zeros(d_sae, n, 3 + extra, dtype=torch.long), dist_reduce_fx=None)
        self.add_state("fired", torch.zeros(d_sae, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(d_sae, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("rows", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(
        self, codes: Codes, uids: Sequence[str] | Tensor, key: Tensor | None = None, extra: Tensor | None = None
    ) -> None:
        """Add one batch.

        Args:
            codes: Codes of N rows.
            uids: The N sample ids, repeated where a sample has several rows; or packed ``(N, 2)``.
            key: ``(N,)`` int64 what to deduplicate by, e.g. :func:`text_keys` of the captions; None: the uid.
            extra: ``(N, e)`` int64 what to keep with each row; decides between equal values of one key.
        """
        v = codes.values.detach().float()
        uid = (uids if isinstance(uids, Tensor) else pack_uids(uids)).to(v.device)
        if len(uid) != codes.n:
            raise InputError(f"{len(uid)} uids for {codes.n} rows of codes")
        if key is None:  # any mixing of the two words that keeps distinct uids apart
            key = uid[:, 0] * -7046029254386353131 + uid[:, 1]
        ids = torch.cat([uid, key.to(v.device)[:, None], *([] if extra is None else [extra.to(v.device)])], 1)
        latent = codes.ids()
        self.rows = self.rows + codes.n
        self.fired = self.fired.scatter_add(0, latent.flatten(), (v != 0).flatten().long())
        self.total = self.total.scatter_add(0, latent.flatten(), v.double().abs().flatten())
        # only what can still enter: at least the last place of its latent (equal values may win by uid)
        row, col = ((v != 0) & (v.abs() >= self.values[:, -1].abs()[latent])).nonzero(as_tuple=True)
        self._insert(latent[row, col], v[row, col], ids[row])

    def _insert(self, latent: Tensor, value: Tensor, ids: Tensor) -> None:
        touched = latent.unique()
        value = torch.cat([self.values[touched].flatten(), value])
        latent = torch.cat([touched.repeat_interleave(self.n_top), latent])
        ids = torch.cat([self.ids[touched].flatten(0, 1), ids])
        keep = value != 0
        latent, value, ids = latent[keep], value[keep], ids[keep]
        order = lexsort(latent, -value.abs(), -value, *ids[:, :2].unbind(1), *ids[:, 3:].unbind(1))
        latent, value, ids = latent[order], value[order], ids[order]
        # of each (latent, key) the first in this order stays; stable sorting by key leaves the best one first
        by_key = lexsort(latent, ids[:, 2])
        first = torch.zeros_like(keep[keep])
        first[by_key[run_starts(latent[by_key], ids[by_key, 2])]] = True
        latent, value, ids = latent[first], value[first], ids[first]
        place = places(latent)
        top = place < self.n_top
        values, table = self.values.clone(), self.ids.clone()
        values[touched] = 0
        values[latent[top], place[top]] = value[top]
        table[latent[top], place[top]] = ids[top]
        self.values, self.ids = values, table

    def part(self) -> dict[str, Tensor]:
        """What was seen, compact, for a file; :meth:`merge` takes it."""
        latent, place = (self.values != 0).nonzero(as_tuple=True)
        table = {"latent": latent, "value": self.values[latent, place], "id": self.ids[latent, place]}
        return table | {name: getattr(self, name).clone() for name in ("fired", "total", "rows")}

    def merge(self, part: Mapping[str, Tensor]) -> None:
        """Add what another metric of the same sizes has seen (:meth:`part`)."""
        self._update_count += 1
        part = {k: v.to(self.values.device) for k, v in part.items()}
        for name in ("fired", "total", "rows"):
            setattr(self, name, getattr(self, name) + part[name])
        self._insert(part["latent"], part["value"], part["id"])

    def compute(self) -> TopTable:
        """The tables over everything that all ranks have seen."""
        if self.values.dim() == 3:  # gathered: one table per rank, merged here
            mine, parts = (self.values, self.ids), list(zip(self.values, self.ids, strict=True))
            self.values, self.ids = parts[0]
            for values, ids in parts[1:]:
                latent, place = (values != 0).nonzero(as_tuple=True)
                self._insert(latent, values[latent, place], ids[latent, place])
            values, ids = self.values, self.ids
            self.values, self.ids = mine
        else:
            values, ids = self.values, self.ids
        mean = self.total / self.fired.clamp(min=1)
        return TopTable(values, ids[..., :2], self.fired, mean, int(self.rows), ids[..., 3:])


def top_evidence(
    codes: Codes, uids: Sequence[str], n: int = 10, key: Tensor | None = None, chunk: int = 8192
) -> TopTable:
    """:class:`TopN` of codes that are at hand already, ``chunk`` rows at a time."""
    metric = TopN(codes.d_sae, n, sync_on_compute=False).to(codes.values.device)  # of these codes alone
    packed = pack_uids(uids)
    for lo in range(0, codes.n, chunk):
        part = slice(lo, lo + chunk)
        metric.update(codes.rows(part), packed[part], None if key is None else key[part])
    return metric.compute()
