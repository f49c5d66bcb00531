"""Pooled codes turned from items to latents, block by block, and what is chosen of every latent's list.

The parts hold their entries latent after latent, so a block of latents is a slice of each; blocks are cut such that a
block's entries fit into memory. All orders end in the uid, so nothing depends on the order of shards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from mmsae.interpret.evidence.corpus import CorpusItems
from mmsae.interpret.evidence.options import Evidencing
from mmsae.interpret.evidence.parts import ReadPart

BLOCK = 1 << 22  # entries of a block


class LatentBlock(NamedTuple):
    """The lists of some neighbouring latents."""

    low: int  #: First latent
    high: int  #: Latent behind the last
    latent: np.ndarray  #: ``(E,) int32`` from ``low`` on, ascending; within one the items ascend
    item: np.ndarray  #: ``(E,) int32``
    value: np.ndarray  #: ``(E,) float32``
    position: np.ndarray  #: ``(E,) int32``

    @property
    def start(self) -> np.ndarray:
        """``(latents + 1,)`` where each latent's entries begin."""
        return np.searchsorted(self.latent, np.arange(self.low, self.high + 1))


class _Chunk(NamedTuple):
    part: ReadPart
    first: int  # number of the part's first item
    start: np.ndarray  # (d_sae + 1,)
    offset: int  # of the chunk's entries in the part's arrays


def latent_blocks(corpus: CorpusItems, modality: str, d_sae: int, budget: int = BLOCK) -> Iterator[LatentBlock]:
    """All lists of a modality, in the order of latents; a block has at most ``budget`` entries, or one latent."""
    chunks, total = [], np.zeros(d_sae, np.int64)
    for part, first in corpus.parts():
        offset = 0
        for start in part.get(f"{modality}.list.start", np.int64).reshape(-1, d_sae + 1):
            chunks.append(_Chunk(part, first, start, offset))
            total += np.diff(start)
            offset += int(start[-1])
    low = 0
    while low < d_sae:
        ends = np.cumsum(total[low:])
        high = low + max(1, int(np.searchsorted(ends, budget, side="right")))
        yield _block(chunks, modality, low, high)
        low = high


def _block(chunks: Sequence[_Chunk], m: str, low: int, high: int) -> LatentBlock:
    columns: list[tuple[np.ndarray, ...]] = []
    for c in chunks:
        lo, hi = c.offset + int(c.start[low]), c.offset + int(c.start[high])
        if hi > lo:
            latent = np.repeat(np.arange(low, high, dtype=np.int32), np.diff(c.start[low : high + 1]))
            item, value, position = (c.part.arrays[f"{m}.list.{k}"][lo:hi] for k in ("item", "value", "position"))
            columns.append((latent, item + np.int32(c.first), value, position))
    if not columns:
        none = np.zeros(0, np.int32)
        return LatentBlock(low, high, none, none, np.zeros(0, np.float32), none)
    latent, item, value, position = (np.concatenate(c) for c in zip(*columns, strict=True))
    order = np.argsort(latent, kind="stable")  # chunks come in the order of items
    return LatentBlock(low, high, latent[order], item[order], value[order], position[order])


class RankedBlock(NamedTuple):
    """The entries of a block that may be evidence, per latent by absolute value, sign and uid, the largest first."""

    at: np.ndarray  #: ``(K,)`` places in the block
    latent: np.ndarray  #: ``(K,)`` latents, counted from the block's first
    place: np.ndarray  #: ``(K,)`` rank in the latent's list, from 0
    count: np.ndarray  #: ``(latents,)`` entries of each latent

    @classmethod
    def of(cls, block: LatentBlock, corpus: CorpusItems, copies: np.ndarray | None) -> RankedBlock:
        """``copies (n,)`` says which items are copies of others and left out; None: nothing is."""
        at = np.arange(len(block.item)) if copies is None else np.flatnonzero(copies[block.item] < 0)
        latent = (block.latent[at] - block.low).astype(np.int64)
        size = np.abs(block.value[at]).view(np.uint32).astype(np.int64)  # bits of what is not negative order it
        key = (latent << 32) | (0xFFFFFFFF - size)
        order = np.argsort(key, kind="stable")
        _by_uid(order, key, block.value[at], corpus.rank[block.item[at]])
        at, latent = at[order], latent[order]
        count = np.bincount(latent, minlength=block.high - block.low)
        place = np.arange(len(at)) - (np.cumsum(count) - count)[latent]
        return cls(at, latent, place, count)


def _by_uid(order: np.ndarray, key: np.ndarray, value: np.ndarray, rank: np.ndarray) -> None:
    """Sort entries of equal absolute value, which are rare, by sign and uid; in place."""
    sorted_key = key[order]
    same = sorted_key[1:] == sorted_key[:-1]
    tied = np.zeros(len(order), bool)
    tied[1:] |= same
    tied[:-1] |= same
    where = np.flatnonzero(tied)
    own = order[where]
    order[where] = own[np.lexsort((rank[own], -value[own], key[own]))]


def top_of(block: LatentBlock, ranked: RankedBlock, n_top: int) -> dict[str, np.ndarray]:
    """``value, item, position (latents, n_top)`` of the first of every latent."""
    shape = (block.high - block.low, n_top)
    out = {"value": np.zeros(shape, np.float32), "item": np.full(shape, -1, np.int32)}
    out["position"] = np.zeros(shape, np.int32)
    on = ranked.place < n_top
    at, to = ranked.at[on], (ranked.latent[on], ranked.place[on])
    for name, table in out.items():
        table[to] = getattr(block, name)[at]
    return out


def quota(n: int) -> tuple[int, int]:
    """How many of ``n`` are of the train half, and of the test half."""
    return n - n // 2, n // 2


def positives_of(
    block: LatentBlock, ranked: RankedBlock, corpus: CorpusItems, choice: Evidencing
) -> tuple[np.ndarray, np.ndarray]:
    """``(latents, quantiles, each)`` items of equal quantiles, half of either half; and which latents are eligible."""
    q, each = choice.quantiles, choice.each
    eligible = ranked.count >= choice.min_items
    out = np.full((block.high - block.low, q, each), -1, np.int32)
    on = eligible[ranked.latent]
    latent, place, item = ranked.latent[on], ranked.place[on], block.item[ranked.at[on]]
    part = place * q // ranked.count[latent]
    test = corpus.test[item]
    cell = (latent * q + part) * 2 + test
    chance = mixed(corpus.draw[item], latent + block.low, choice.seed)
    bits = np.uint64(max(1, int(len(eligible) * q * 2).bit_length()))  # of the cell, above those of chance
    order = np.argsort((cell.astype(np.uint64) << (np.uint64(64) - bits)) | (chance >> bits))
    cell, item = cell[order], item[order]
    first = np.searchsorted(cell, cell)
    nth = np.arange(len(cell)) - first
    most = np.array(quota(each))[cell % 2]
    take = nth < most
    cell, item, nth = cell[take], item[take], nth[take]
    slot = np.where(cell % 2, quota(each)[0], 0) + nth
    out[cell // 2 // q, cell // 2 % q, slot] = item
    return out, eligible


def mixed(draw: np.ndarray, latent: np.ndarray, seed: int) -> np.ndarray:
    """``(E,) uint64`` a number for every pair of item and latent, as good as random (splitmix64)."""
    with np.errstate(over="ignore"):
        x = (draw * 2**48).astype(np.uint64) << np.uint64(16)
        x ^= (latent.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        x += np.uint64(seed % 2**32) * np.uint64(0xD1342543DE82EF95)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
        return x ^ (x >> np.uint64(31))
