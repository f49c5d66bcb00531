"""Exact selection at the price of a product in bfloat16, on processors that multiply it faster than float32.

Operands are rounded to bfloat16, and how far an entry of their product can be from the true one is bounded for certain:
``|x w - x' w'| <= |x - x'| |w| + |x'| |w - w'|``, norms of what was rounded off in fact, with what sums and the result
lose. Entries that cannot be chosen are left out by it; those that may be, less than twice as many as are chosen, are
computed in float32, and the choice is made among these. Where the bound says too little (activations with a few huge
coordinates), where a row has too few positive entries, and where there is a NaN, the product is made in float32.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmsae.kernels import grouped
from mmsae.kernels.backend import Backend, Ranking, Score
from mmsae.kernels.plain import NATIVE_BF16, Segments, by_latent, linear, row_chunks

ROWS = 256  # with fewer of them, what the weights cost (rounding, bounds) is not won back
WIDTH = 4096  # latents: a product with fewer takes little beside the rest of a step
LEAST = 64  # latents for each that is chosen: float32 sums of the candidates take as long as is won at about 25
BLOCK = 2048  # rows whose candidates are computed at once: each atom is read once, and the rows stay in the cache
ROUNDING = 2.0**-8  # of a number to bfloat16, relative, at most
MOST = 16  # a row of which more than one in so many may be chosen is left to float32
SUM = 2.0**-24  # of a sum in float32


def screen_pays(backend: Backend, x: Tensor, weight: Tensor, k: float, score: Score | None) -> bool:
    """Whether about k of the entries of ``x (N, d) @ weight (F, d).T`` are chosen faster behind a screen."""
    return (
        NATIVE_BF16
        and backend.name == "torch"
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and len(x) >= ROWS
        and len(weight) >= max(WIDTH, LEAST * k)
        and torch.get_num_threads() <= grouped.THREADS
        and (score is None or isinstance(score, Ranking))
    )


class Candidates(NamedTuple):
    """Entries that may be chosen, of some rows, row by row, in float32."""

    places: np.ndarray  #: Ascending, in a matrix of these rows.
    latents: np.ndarray  #: Their columns.
    start: np.ndarray  #: Where each row begins.
    count: np.ndarray  #: How many it has.
    entries: np.ndarray  #: Of ``(x @ weight.T) * scale + bias``.
    scores: np.ndarray  #: What is ranked.


class Screen:
    """The rounded operands of ``(x @ weight.T) * scale + bias``, and how far its ranked entries can be off.

    Positive bfloat16 numbers are ordered as the integers that have their bits, and negative ones are below them: what
    is compared with a positive bound is compared as integers of 16 bits, called keys here.

    Args:
        x: ``(N, d)``.
        weight: ``(F, d)``.
        bias: ``(F,)`` or None.
        scale: ``(F,)`` or None.
        ranking: What is ranked.
    """

    def __init__(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, ranking: Ranking | None
    ) -> None:
        self.x, self.weight, self.bias, self.scale, self.ranking = x, weight, bias, scale, ranking or Ranking()
        self.chunks = list(row_chunks(len(x), len(weight), x.device))
        factors = [f for f in (scale, self.ranking.factor) if f is not None]
        factor = factors[0] if len(factors) == 1 else factors[0] * factors[1] if factors else None
        self._weight = torch.empty(weight.shape, dtype=torch.bfloat16)
        norms, losses = [], []
        for start in range(0, len(weight), 256):  # parts that stay in the cache
            rows = slice(start, start + 256)
            part = weight[rows] if factor is None else weight[rows] * factor[rows, None]
            off = self._weight[rows].copy_(part).float().sub_(part)
            norms.append(part.norm(dim=1).max())
            losses.append(off.norm(dim=1).max())
        norm, lost = torch.stack(norms).max(), torch.stack(losses).max()
        self._x = x.bfloat16()
        kept = self._x.float()
        length = kept.norm(dim=1)
        # the product's own sums and those that replace them; a factor is multiplied in before and after
        sums = (2.1 * x.shape[1] + 8) * SUM
        error = (x - kept).norm(dim=1) * norm + length * (lost + sums * norm)
        self._bias = None
        if bias is not None:
            part = bias if self.ranking.factor is None else bias * self.ranking.factor
            self._bias = part.bfloat16()
            error += (part - self._bias).abs().max() + 8 * SUM * part.abs().max()
        self._error = error.numpy()

    # ------------------------------------------------------------------------------------ the k largest of every row
    def topk(self, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """``(entries (N, k), ids (N, k), odd)``; ids ascend. Of rows ``odd`` the bound says too little."""
        n, width = len(self.x), len(self.weight)
        values, ids = torch.empty(n, k), torch.empty(n, k, dtype=torch.long)
        odd = np.zeros(n, bool)
        for rows in _blocks(self.chunks):
            at, found = rows[0].start, []
            for chunk in rows:
                if chunk.start and 4 * np.count_nonzero(odd[: chunk.start]) > chunk.start:
                    odd[chunk] = True  # the bound says nothing of this batch
                    places = _first(np.arange(chunk.stop - chunk.start), width, k)
                else:
                    places, odd[chunk] = self._may_be_largest(chunk, k)
                found.append(places + (chunk.start - at) * width)
            block = slice(at, rows[-1].stop)
            c = self._exact(block, np.concatenate(found))
            c.scores[np.repeat(odd[block], c.count)] = 0.0  # they need k that are numbers
            cut = np.repeat(grouped.kth_largest(c.scores, c.start, c.count, k), c.count)
            on = grouped.chosen(c.scores, cut, c.count, k)
            values[block] = torch.from_numpy(c.entries.compress(on).reshape(-1, k))
            ids[block] = torch.from_numpy(c.latents.compress(on).reshape(-1, k))
        return values, ids, torch.from_numpy(np.flatnonzero(odd))

    def _may_be_largest(self, rows: slice, k: int) -> tuple[np.ndarray, np.ndarray]:
        """``(places, odd)``: those that may be among the k largest of their row; of rows ``odd (n,)`` the first k."""
        keys, error = self._keys(rows), self._error[rows]
        n, width = keys.shape
        groups = min(max(128, 2 * k, min(4 * k, 512)), width // 2)
        reached = np.partition(_maxima(keys, groups), groups - k, axis=1)[:, groups - k]
        places = np.flatnonzero(keys >= _least_keys(_below(_numbers(reached), error), 0x7FFF)[:, None])
        start, count = grouped.rows_of(places, n, width)
        odd = (count < k) | (count > width // MOST)
        if odd.any():
            others = _first(np.flatnonzero(odd), width, k)
            places = np.sort(np.concatenate([places[~np.repeat(odd, count)], others]))
            start, count = grouped.rows_of(places, n, width)
        rounded = _numbers(keys.reshape(-1).take(places))
        cut = _below(grouped.kth_largest(rounded, start, count, k), error)
        on = rounded >= np.repeat(cut, count)
        return places[on | np.repeat(odd, count)] if odd.any() else places.compress(on), odd

    # ------------------------------------------------------------------------------------------- all above a threshold
    def above(self, threshold: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """``(entries, ids, whether they count)``, all ``(N, K)``, of scores above a threshold, one or ``(F,)``.

        K is the most that a row has, and at least 1. None where the bound says too little.
        """
        bound = threshold.detach().float().reshape(-1).numpy()
        found = self._reaching(bound)
        if found is None:
            return None
        latents = np.concatenate([c.latents for c in found])
        scores = np.concatenate([c.scores for c in found])
        on = scores > (bound if len(bound) == 1 else bound.take(latents))
        n, width = len(self.x), len(self.weight)
        rows = np.repeat(np.arange(n), np.concatenate([c.count for c in found]))
        ids, kept = grouped.padded((rows * width + latents).compress(on), n, width)
        values = torch.zeros(ids.shape)
        values[kept] = torch.from_numpy(np.concatenate([c.entries for c in found]).compress(on))
        return values, ids, kept

    # ----------------------------------------------------------------------------------------- the largest of a batch
    def reaching(self, budget: int, slack: float) -> grouped.Found | None:
        """What :func:`mmsae.kernels.grouped.largest` asks; None where the bound says too little."""
        n, width = len(self.x), len(self.weight)
        first = self.chunks[0]
        rank = grouped.share(budget, first.stop, n, slack)
        keys = self._keys(first)
        bound = grouped.reached(_numbers(_maxima(keys, width // max(1, width // 512))), rank, keys.size)
        found = self._reaching(np.full(1, bound, np.float32), keys) if bound > 0 else None
        if found is None:
            return None
        places, scores, entries = [], [], []
        for chunk, c in zip(_blocks(self.chunks), found, strict=True):
            on = c.scores >= bound
            places.append(c.places.compress(on) + chunk[0].start * width)
            scores.append(c.scores.compress(on))
            entries.append(c.entries.compress(on))
        return np.concatenate(places), np.concatenate(scores), np.concatenate(entries), bound

    def _reaching(self, bound: np.ndarray, first: np.ndarray | None = None) -> list[Candidates] | None:
        """Entries whose score may reach a bound, one or ``(F,)``, block by block; ``first`` are keys of a chunk."""
        width, found = len(self.weight), []
        for rows in _blocks(self.chunks):
            places = []
            for chunk in rows:
                keys = self._keys(chunk) if first is None else first
                first = None
                least = bound * (1 - ROUNDING) - self._error[chunk].max()
                on = keys >= _least_keys(least, -0x8000)
                if np.isnan(least).any() or LEAST / 2 * np.count_nonzero(on) > on.size:
                    return None
                places.append(np.flatnonzero(on) + (chunk.start - rows[0].start) * width)
            found.append(self._exact(slice(rows[0].start, rows[-1].stop), np.concatenate(places)))
        return found

    # ------------------------------------------------------------------------------------------------------- products
    def _keys(self, rows: slice) -> np.ndarray:
        """``(n, F)`` keys of the rounded scores of some rows."""
        keys = linear(self._x[rows], self._weight, self._bias).view(torch.int16).numpy()
        return np.bitwise_and(keys, 0x7FFF, out=keys) if self.ranking.absolute else keys

    def _exact(self, rows: slice, places: np.ndarray) -> Candidates:
        """Entries and scores of some rows at ascending places."""
        n, width = rows.stop - rows.start, len(self.weight)
        start, count = grouped.rows_of(places, n, width)
        of = np.repeat(np.arange(n), count)
        latents = places - of * width
        ids = torch.from_numpy(latents)
        entries = by_latent(self.x[rows], self.weight, Segments.of(ids, torch.from_numpy(of), width))
        entries = entries if self.scale is None else entries.mul_(self.scale.index_select(0, ids))
        entries = entries if self.bias is None else entries.add_(self.bias.index_select(0, ids))
        factor = self.ranking.factor
        scores = entries if factor is None else entries * factor.index_select(0, ids)
        scores = scores.abs() if self.ranking.absolute else scores
        return Candidates(places, latents, start, count, entries.numpy(), scores.numpy())


def _blocks(chunks: list[slice]) -> list[list[slice]]:
    """Chunks in groups of so many rows."""
    size = max(1, BLOCK // (chunks[0].stop - chunks[0].start))
    return [chunks[i : i + size] for i in range(0, len(chunks), size)]


def _below(kth: np.ndarray, error: np.ndarray) -> np.ndarray:
    """``(n,)`` what the rounded scores of the k largest are at least, by the k-th largest rounded score."""
    return kth * (1 - 2 * ROUNDING) - 2 * error


def _maxima(keys: np.ndarray, groups: int) -> np.ndarray:
    """``(n, groups)`` the largest keys of columns that are so many apart."""
    n, width = keys.shape
    size = width // groups
    return keys[:, : size * groups].reshape(n, size, groups).max(1)


def _numbers(keys: np.ndarray) -> np.ndarray:
    """The numbers that have these bits as bfloat16, in float32."""
    return torch.from_numpy(keys).view(torch.bfloat16).float().numpy()


def _least_keys(numbers: np.ndarray, otherwise: int) -> np.ndarray:
    """The keys of numbers, rounded down, where they are positive."""
    bits = np.ascontiguousarray(numbers, dtype=np.float32).view(np.int32) >> 16
    return np.where(numbers > 0, bits, otherwise).astype(np.int16)


def _first(rows: np.ndarray, width: int, k: int) -> np.ndarray:
    """Places of the first k columns of some rows."""
    return (rows[:, None] * width + np.arange(k)).reshape(-1)
