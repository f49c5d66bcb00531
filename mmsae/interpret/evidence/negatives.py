"""Items on which a latent is silent: drawn at random, and those most like the ones on which it fires.

Both are looked for among a number of items drawn for all latents together, so that what is in evidence does not grow
with the number of latents. What is alike is said by embeddings; where there are none, by the cosine of pooled codes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from mmsae.interpret.evidence.corpus import CorpusItems
from mmsae.interpret.evidence.folder import SparseRows
from mmsae.interpret.evidence.lists import LatentBlock, mixed, quota
from mmsae.interpret.evidence.options import Evidencing

LATENTS = 512  # at a time


class Silence:
    """Looks for silent items, block by block.

    Args:
        corpus: The items.
        copies: ``(n,)`` which are copies; None: they count as any other.
        choice: How many of each kind, and among how many.
        codes: Pooled codes of all items.
        embed: ``(n, width)`` unit embeddings, zeros where an item has none; None: codes say what is alike.
        device: Where similarities are computed.
    """

    def __init__(
        self, corpus: CorpusItems, copies: np.ndarray | None, choice: Evidencing, codes: SparseRows,
        embed: np.ndarray | None, device: torch.device,
    ) -> None:  # fmt: skip
        self.corpus, self.choice, self.codes, self.embed, self.device = corpus, choice, codes, embed, device
        order = np.lexsort((corpus.rank, corpus.draw))
        if copies is not None:
            order = order[copies[order] < 0]
        test = corpus.test[order]
        self.pools = [order[~test], order[test]]
        self.near = [_Near.of(p[: choice.candidates], self) for p in self.pools]

    def of(self, block: LatentBlock, positive: np.ndarray, eligible: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """``(latents, negatives)`` random and hard items of a block, -1 where there are fewer.

        ``positive (latents, m)`` are the items drawn of each latent.
        """
        n, shape = self.choice.negatives, (len(positive), self.choice.negatives)
        random, hard = np.full(shape, -1, np.int32), np.full(shape, -1, np.int32)
        key = (block.latent - block.low).astype(np.int64) * self.corpus.n + block.item  # ascending
        slots = (slice(0, quota(n)[0]), slice(quota(n)[0], n))
        for ids in np.split(np.flatnonzero(eligible), range(LATENTS, int(eligible.sum()), LATENTS)):
            if not len(ids):
                continue
            at = slice(*np.searchsorted(block.latent, [block.low + ids[0], block.low + ids[-1] + 1]))
            row = np.full(len(positive), -1)
            row[ids] = np.arange(len(ids))
            row = row[block.latent[at] - block.low]
            fired = row[row >= 0], block.item[at][row >= 0]
            for half, slot in enumerate(slots):
                n_half = slot.stop - slot.start
                random[ids, slot] = self._random(key, ids, block.low, half, n_half)
                hard[ids, slot] = self._hard(fired, positive[ids], half, n_half)
        return random, hard

    def _silent(self, key: np.ndarray, ids: np.ndarray, items: np.ndarray) -> np.ndarray:
        """Whether latents ``ids (L,)`` are silent on ``items (L, C)``."""
        if not len(key):
            return np.ones(items.shape, bool)
        asked = ids[:, None].astype(np.int64) * self.corpus.n + items
        at = np.searchsorted(key, asked).clip(max=len(key) - 1)
        return key[at] != asked

    def _random(self, key: np.ndarray, ids: np.ndarray, low: int, half: int, n: int) -> np.ndarray:
        """The first silent items of a half behind a place of the pool that depends on the latent."""
        pool, out = self.pools[half], np.full((len(ids), n), -1, np.int32)
        some = min(len(pool), max(self.choice.candidates, 1))
        if not n or not some:
            return out
        begin = (mixed(np.zeros(len(ids)), ids + low, self.choice.seed + 1) % np.uint64(some)).astype(np.int64)
        left, length = np.arange(len(ids)), min(some, 2 * n + 16)
        while len(left):
            items = pool[(begin[left, None] + np.arange(length)) % some]
            out[left] = _first(items, self._silent(key, ids[left], items), n)
            if length == len(pool):
                break
            left = left[out[left, -1] < 0]
            if length == some:  # nearly always on: the whole pool
                some, length = len(pool), len(pool)
            else:
                length = min(some, 4 * length)
        return out

    def _hard(self, fired: tuple[np.ndarray, np.ndarray], positive: np.ndarray, half: int, n: int) -> np.ndarray:
        """The silent candidates of a half most like the latent's own items of that half.

        ``fired`` are the rows of latents and the items on which they fire.
        """
        near, out = self.near[half], np.full((len(positive), n), -1, np.int32)
        if not n or not len(near.items):
            return out
        own = (positive >= 0) & (self.corpus.test[positive] == bool(half))
        score = near.score(positive, own)
        score[~own.any(1)] = -np.inf
        column = near.place[fired[1]]
        score[fired[0][column >= 0], column[column >= 0]] = -np.inf
        k = min(n, score.shape[1])
        found = torch.from_numpy(score).topk(k, dim=1)
        value, best = found.values.numpy(), found.indices.numpy()
        out[:, :k] = np.where(np.isfinite(value), near.items[best], -1)
        return out


def _first(items: np.ndarray, on: np.ndarray, n: int) -> np.ndarray:
    """``(L, n)`` the first items of every row that are on, -1 where there are fewer."""
    out = np.full((len(items), n), -1, np.int32)
    nth = np.cumsum(on, 1) - 1
    row, column = np.nonzero(on & (nth < n))
    out[row, nth[row, column]] = items[row, column]
    return out


class _Near(NamedTuple):
    """Candidates of a half, and how alike they are to others."""

    items: np.ndarray  # (C,)
    place: np.ndarray  # (n,) int32 place of every item among them, or -1
    silence: Silence
    matrix: object  # (C, width) embeddings on the device, or (C, d_sae) csr of unit codes

    @classmethod
    def of(cls, items: np.ndarray, silence: Silence) -> _Near:
        place = np.full(silence.corpus.n, -1, np.int32)
        place[items] = np.arange(len(items))
        if silence.embed is not None:
            held = torch.from_numpy(np.ascontiguousarray(silence.embed[items])).float().to(silence.device)
            return cls(items, place, silence, held)
        return cls(items, place, silence, _unit_rows(silence.codes, items))

    def score(self, positive: np.ndarray, own: np.ndarray) -> np.ndarray:
        """``(L, C)`` cosine of every candidate with the sum of the unit rows of ``positive (L, m)`` that are own."""
        if self.silence.embed is not None:
            which = np.unique(positive[own])
            held = torch.from_numpy(np.ascontiguousarray(self.silence.embed[which])).float().to(self.silence.device)
            weight = torch.zeros(len(positive), len(which), device=held.device)
            row = np.nonzero(own)[0]
            weight[torch.from_numpy(row), torch.from_numpy(np.searchsorted(which, positive[own]))] = 1
            query = torch.nn.functional.normalize(weight @ held, dim=1)
            return (query @ self.matrix.T).cpu().numpy()
        from scipy.sparse import csr_matrix

        which = np.unique(positive[own])
        row = np.nonzero(own)[0]
        weight = csr_matrix((np.ones(len(row), np.float32), (row, np.searchsorted(which, positive[own]))),
                            shape=(len(positive), len(which)))  # fmt: skip
        query = weight @ _unit_rows(self.silence.codes, which)
        return np.asarray((query @ self.matrix.T).todense(), np.float32)


def _unit_rows(codes: SparseRows, items: np.ndarray):
    """``csr_matrix (m, d_sae)`` of the pooled codes of some items, at unit length."""
    from scipy.sparse import diags

    order = np.argsort(items)
    rows = codes.matrix(items[order])[np.argsort(order)].astype(np.float32)
    norm = np.sqrt(np.asarray(rows.multiply(rows).sum(1)).ravel())
    return diags(1 / np.maximum(norm, 1e-12)) @ rows
