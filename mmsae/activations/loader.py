"""Shuffled batches from a store, without workers, exactly resumable.

A mapped file read in blocks by the training process itself is faster than any worker that has to copy its batches
through shared memory (three times, measured), so ``workers`` does not exist here. For a GPU, batches are gathered from
rows that are there already (:mod:`mmsae.activations.resident`), or sent ahead (:mod:`mmsae.activations.prefetch`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmsae.activations.prefetch import prefetched
from mmsae.activations.resident import ResidentRows
from mmsae.activations.store import AUTO_VERIFY_BYTES, ActivationStore, not_finite
from mmsae.activations.uids import uid_hash
from mmsae.shards import UidList
from mmsae.shards.uids import uid_words
from mmsae.types import InputError, Site, Tokens

Rows = Mapping[str, np.ndarray]

# Entries of a state's order that options have another name for.
_CALLED = {
    "rows": "batches over all ranks (batch_size or quotas of a rank, times ranks) of",
    "split": "split (val_fraction to 1)",
    "batches": "batches per epoch (val_fraction or limit_train_batches)",
}


class BlockOrder:
    """The rows of a split in block-shuffled order, computed where needed instead of kept.

    ``keep (N,)`` says which rows belong to the split, ``block`` neighbours stay together, and ``seed`` orders the
    blocks; the rows' places inside a window are the loader's affair.
    """

    def __init__(self, keep: np.ndarray, block: int, seed: int) -> None:
        self.keep, self.block, self.seed = keep, block, seed
        starts = np.arange(0, len(keep), block)
        self._kept = np.pad(keep, (0, -len(keep) % block))  # the last block is whole
        self._counts = np.add.reduceat(keep, starts, dtype=np.int64) if len(keep) else np.zeros(0, np.int64)
        self._epoch: int | None = -1
        self._use(None)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def _use(self, epoch: int | None) -> None:
        if epoch != self._epoch:
            blocks = np.arange(len(self._counts))
            if epoch is not None:
                np.random.default_rng([self.seed, epoch]).shuffle(blocks)
            self._epoch, self._blocks, self._ends = epoch, blocks, np.cumsum(self._counts[blocks])

    def span(self, epoch: int | None, lo: int, hi: int) -> np.ndarray:
        """Row numbers at places ``lo`` to ``hi`` of an epoch's sequence; ``epoch=None``: in stored order."""
        self._use(epoch)
        if hi <= lo:
            return np.zeros(0, np.int64)
        a, b = np.searchsorted(self._ends, [lo, hi - 1], side="right")
        rows = (self._blocks[a : b + 1, None] * self.block + np.arange(self.block)).reshape(-1)
        rows = rows[self._kept[rows]]
        skip = lo - int(self._ends[a] - self._counts[self._blocks[a]])
        return rows[skip : skip + hi - lo]


class Split(NamedTuple):
    """A share of a store's items, see :func:`split_items`."""

    lo: float = 0.0  #: Where it begins.
    hi: float = 1.0  #: Where it ends.
    keep: UidList | None = None  #: The uids whose items are meant, as if the store held no others; None: all.


def listed_items(store: ActivationStore, keep: UidList | None) -> np.ndarray:
    """``(items,) bool``: the items of a store whose uid is listed; all, without a list."""
    if keep is None:
        return np.ones(len(store), bool)
    return np.concatenate([keep.among(uid_words(column)) for column in store.columns("uid")])


def split_items(store: ActivationStore, lo: float, hi: float, among: np.ndarray | None = None) -> np.ndarray:
    """``(items,) bool``: the items of the share ``lo`` to ``hi`` of a store, or of some of its items.

    Items are ranked by a hash of their uid, which no seed changes: every rank, every run and every seed validates on
    the same items, shares are exact, and ``(0, a)`` and ``(a, 1)`` are disjoint and complete.
    """
    if lo <= 0 and hi >= 1:  # of a billion items their hashes would take 16 GB of every rank
        return np.ones(len(store), bool) if among is None else among.copy()
    hashes = np.concatenate([uid_hash(column) for column in store.columns("uid")])
    order = np.argsort(hashes, kind="stable")
    order = order if among is None else order[among[order]]
    chosen = np.zeros(len(store), bool)
    chosen[order[round(lo * len(order)) : round(hi * len(order))]] = True
    return chosen


class StoreLoader:
    """Iterates over :class:`~mmsae.types.Tokens` of one split of a store.

    Shuffled (training): a batch of all ranks together has ``world * batch_size`` rows, and the sequence of those
    batches depends on (seed, epoch) and their size alone; a rank has its share of each, in the order of ranks. So any
    number of ranks that shares them evenly sees the same batches. The rest of an epoch (fewer rows than such a batch,
    others in each epoch) is left out. A split smaller than one batch per rank is one smaller batch.

    Not shuffled (validation): every row exactly once, in stored order; ranks have equally many batches whose sizes
    differ by at most one, so that nothing waits and nothing is counted twice.

    Pooled sites give pairs: row i of every modality is one item. If any chosen site has several rows per item, the
    modalities are read independently with a fixed quota each, in proportion to their rows.

    ``state_dict`` is a place in the sequence, so training that is resumed sees the very batches that it would have
    seen, on another number of ranks too if ``world * batch_size`` is what it was. ``iter()`` starts the next epoch, or
    goes on from a state that was loaded.

    Args:
        store: The store.
        batch_size: Rows per batch and rank (token sites: of the modality with most rows).
        seed: Seed of the order.
        split: Share of the items, ``(lo, hi)``, or a :class:`Split` of those that a list of uids has.
        rank: This process.
        world: Number of processes.
        shuffle: Training or validation behaviour.
        sites: ``{modality: site}`` where a modality has several, or to leave one out.
        quotas: ``{modality: rows per batch}`` for token sites.
        block: Neighbouring rows that are read together.
        window: Blocks that are mixed with each other; memory is ``block * window`` rows, or 4 batches of all ranks if
            that is more, and each rank holds its share.
        uids: Whether batches carry uids; by default where nothing is shuffled.

    Attributes:
        epoch: The epoch that the next ``iter()`` gives, or the one that runs.
        sizes: ``{modality: rows of a batch}`` of this rank.
        total: ``{modality: rows of a batch}`` of all ranks together.
        lanes: Parts of an epoch that are read side by side, each with an equal share of every batch: 1, but as many as
            ranks where a run of an earlier version goes on.

    Raises:
        InputError: The split has fewer items than there are ranks, or rows that are not finite (found here where the
            store is below 2 GB, else where they are read).
    """

    def __init__(
        self,
        store: ActivationStore,
        batch_size: int = 512,
        *,
        seed: int = 0,
        split: Split | tuple[float, float] = Split(),
        rank: int = 0,
        world: int = 1,
        shuffle: bool = True,
        sites: Mapping[str, str | Site] | None = None,
        quotas: Mapping[str, int] | None = None,
        block: int = 256,
        window: int = 64,
        uids: bool | None = None,
    ) -> None:
        self.store, self.seed, self.rank, self.world, self.shuffle = store, seed, rank, world, shuffle
        self.split = split = Split(*split)
        self.names = store.spec.choose(sites)
        self.uids = not shuffle if uids is None else uids
        listed = None if split.keep is None else listed_items(store, split.keep)
        items = split_items(store, split.lo, split.hi, listed)
        n_items, of = int(items.sum()), len(store) if listed is None else int(listed.sum())
        if n_items < world:
            raise InputError(
                f"{store.folder}: {n_items} of {of} items are in the split {split.lo:g} to {split.hi:g}, "
                f"fewer than {world} ranks"
            )
        self.paired = all(store.spec.pooled(n) for n in self.names.values())
        if self.paired:
            self.orders = dict.fromkeys(self.names, BlockOrder(items, block, seed))
        else:
            self.orders = {}
            for salt, (m, n) in enumerate(self.names.items()):
                keep = items[store.items_of_rows(n, np.arange(store.spec.rows[n]))]
                self.orders[m] = BlockOrder(keep, block, seed + salt)
        self._quotas(batch_size, quotas)
        self.total = {m: s * world for m, s in self.sizes.items()}
        self.lanes, self._rows_of_window = 1, window * block
        self.epoch, self.batch = 0, 0
        self.device, self.resident = torch.device("cpu"), None
        self._places = torch.empty(0, dtype=torch.long)
        if store.spec.nbytes < AUTO_VERIFY_BYTES:
            for m, o in self.orders.items():
                bad = store.not_finite(self.names[m])
                self._refuse(m, int(o.keep[bad].sum()), len(o))
        self._begun = False  # whether a batch was drawn since iter(): Lightning calls iter() once more just to look

    def _refuse(self, m: str, bad: int, n: int) -> None:
        """Rows that are not finite would make every mean NaN, and no word of why."""
        if bad:
            lo, hi, _ = self.split
            raise InputError(
                f"{self.store.folder}: {bad:,} of {n:,} {m} rows in the split {lo:g} to {hi:g} are not finite (NaN or "
                "infinite); write the store without them, as mmsae extract does"
            )

    def _quotas(self, batch_size: int, quotas: Mapping[str, int] | None) -> None:
        rows = {m: len(o) for m, o in self.orders.items()}
        most = max(rows.values())
        per_rank = {m: n // self.world for m, n in rows.items()}
        self.sizes = dict(quotas or {m: max(1, round(batch_size * n / most)) for m, n in rows.items()})
        if set(self.sizes) != set(rows) or (self.paired and len(set(self.sizes.values())) > 1):
            raise InputError(
                f"quotas are {self.sizes}; {', '.join(rows)} need one each, equal ones where they are pairs"
            )
        self.sizes = {m: max(1, min(s, per_rank[m])) for m, s in self.sizes.items()}
        if self.shuffle:
            self._len = min(per_rank[m] // s for m, s in self.sizes.items())
        else:
            self._len = max(-(-n // (s * self.world)) for n, s in zip(rows.values(), self.sizes.values(), strict=True))
            if self.paired:  # no batch may be empty, also where batch_size is 1
                self._len = min(self._len, *per_rank.values())
        if not all(per_rank.values()):
            raise InputError(f"{self.store.folder}: the split has {rows} rows, too few for {self.world} ranks")

    def put(self, device: torch.device, resident: ResidentRows | None = None) -> StoreLoader:
        """Have batches come on a device: gathered there from ``resident`` rows, or sent ahead of their use to a GPU.

        They are the same batches in the same order.
        """
        self.device, self.resident = device, resident
        for m, o in self.orders.items() if resident is not None else ():
            self._refuse(m, int(o.keep[self.store.not_finite(self.names[m])].sum()), len(o))
        return self

    def __len__(self) -> int:
        """Batches per epoch and rank; the same on every rank."""
        return self._len

    def cut(self, batches: int) -> None:
        """End every epoch after at most so many batches."""
        self._len = min(self._len, batches)

    @property
    def n_rows(self) -> dict[str, int]:
        """``{modality: rows in the split}``, over all ranks."""
        return {m: len(o) for m, o in self.orders.items()}

    def state_dict(self) -> dict[str, Any]:
        """The place in the sequence: ``epoch``, batches of all ranks done in it, and what the order was made from."""
        return {"epoch": self.epoch, "batch": self.batch, "order": self._order_key()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken, at the next ``iter()``.

        Raises:
            InputError: The state belongs to another order: other data, another seed, or batches of another size.
        """
        order = _of_lanes(state["order"])
        if order["lanes"] != self.lanes and not any(n % order["lanes"] for n in self.total.values()):
            self.lanes = order["lanes"]
        for k, now in self._order_key().items():
            then = order.get(k, now if k == "split" else None)  # earlier versions did not note the split
            if then != now:
                raise InputError(
                    f"{self.store.folder}: the checkpoint was made with {_CALLED.get(k, k)} {then}, this run has "
                    f"{now}; resuming would not continue the same run"
                )
        self.epoch, self.batch, self._begun = state["epoch"], state["batch"], False

    def _order_key(self) -> dict[str, Any]:
        key = {"content_hash": self.store.spec.content_hash, "sites": dict(self.names), "rows": self.total}
        block, keep = next(iter(self.orders.values())).block, self.split.keep
        key |= {"seed": self.seed, "lanes": self.lanes, "split": list(map(float, self.split[:2])), "batches": len(self)}
        return key | {"block": block, "window": self._window, "keep": keep if keep is None else keep.hash}

    @property
    def _window(self) -> int:
        """Batches between which rows are mixed; at least 4, so that large ones mix too."""
        return max(4, self._rows_of_window * self.lanes // max(self.total.values()))

    def __iter__(self) -> Iterator[Tokens]:
        if self._begun or self.batch >= len(self):
            self.epoch, self.batch = self.epoch + 1, 0
        self._begun = False
        return self._train(self.epoch, self.batch) if self.shuffle else self._placed(self._ordered())

    def _train(self, epoch: int, first: int) -> Iterator[Tokens]:
        for b, batch in enumerate(self._placed(self._mixed(epoch, first)), first):
            self.batch, self._begun = b + 1, True  # a checkpoint written while this batch is trained on has it done
            yield batch

    def _placed(self, batches: Iterator[Tokens]) -> Iterator[Tokens]:
        """Batches as stored, where they are used, in float32."""
        ahead = self.device.type == "cuda" and self.resident is None
        for batch in prefetched(batches, self.device) if ahead else batches:
            grad = batch.grad and {m: g.float() for m, g in batch.grad.items()}
            yield batch._replace(x={m: x.float() for m, x in batch.x.items()}, grad=grad)

    def _mixed(self, epoch: int, first: int) -> Iterator[Tokens]:
        """Batches of an epoch from the first one on, rows as stored."""
        source = self._read if self.resident is None else self._gathered
        for w in range(first // self._window, -(-len(self) // self._window)):
            lo, hi = w * self._window, min((w + 1) * self._window, len(self))
            rows, mix = self._mine(epoch, w, lo, hi)
            places = ({m: slice(b * s, b * s + s) for m, s in self.sizes.items()} for b in range(hi - lo))
            yield from source(rows, mix, islice(places, max(lo, first) - lo, None))

    def _read(self, rows: Rows, mix: dict[str, Tensor], places: Iterator[dict[str, slice]]) -> Iterator[Tokens]:
        """Batches of a window that is read as a whole."""
        x = {m: self.store.rows(n, rows[m], dtype=None) for m, n in self.names.items()}
        grad = self.store.gradients(self.names, rows)
        self._check(x)
        for at in places:
            pick = {m: mix[m][place] for m, place in at.items()}
            x_b, grad_b = ({m: self._take(v, pick[m]) for m, v in some.items()} for some in (x, grad))
            if self.paired and not self.uids:
                yield self._pooled(x_b, grad_b)
            else:
                yield self.store.tokens(
                    self.names, {m: rows[m][p.numpy()] for m, p in pick.items()}, self.uids, x_b, grad_b
                )

    def _gathered(self, rows: Rows, mix: dict[str, Tensor], places: Iterator[dict[str, slice]]) -> Iterator[Tokens]:
        """Batches of a window whose rows are on the device; their numbers are sent once."""
        numbers = {m: r[mix[m].numpy()] for m, r in rows.items()}
        ids = self.resident.numbers(numbers)
        for at in places:
            here = {m: ids[m][place] for m, place in at.items()}
            if self.uids:
                yield self._named({m: numbers[m][place] for m, place in at.items()}, *self.resident.rows(here))
            elif self.paired:
                yield self._pooled(*self.resident.rows(here))
            else:
                yield self.resident.tokens(here)

    def _take(self, rows: Tensor, pick: Tensor) -> Tensor:
        """Rows of a window; in memory that a GPU can copy from by itself where they go to one."""
        out = None
        if self.device.type == "cuda":
            out = torch.empty(len(pick), *rows.shape[1:], dtype=rows.dtype, pin_memory=True)
        return torch.index_select(rows, 0, pick, out=out)

    def _pooled(self, x: dict[str, Tensor], grad: dict[str, Tensor]) -> Tokens:
        first = next(iter(x.values()))
        if len(self._places) != len(first) or self._places.device != first.device:
            self._places = torch.arange(len(first), device=first.device)
        return Tokens(x, dict.fromkeys(x, self._places), grad=grad or None)

    def _named(self, rows: Rows, x: dict[str, Tensor], grad: dict[str, Tensor]) -> Tokens:
        """A batch whose rows are on the device, with what only the store knows."""
        tokens = self.store.tokens(self.names, rows, self.uids, x, grad)
        return tokens.each(lambda t: t.to(self.device))

    def _mine(self, epoch: int, window: int, lo: int, hi: int) -> tuple[Rows, dict[str, Tensor]]:
        """This rank's rows of the batches ``lo`` to ``hi`` in the order of reading, and their order in batches."""
        apart = list(self.names)[:1] if self.paired else list(self.names)
        rows: dict[str, list[np.ndarray]] = {m: [] for m in apart}
        mix: dict[str, list[np.ndarray]] = {m: [] for m in apart}
        for lane in range(self.rank * self.lanes // self.world, -(-(self.rank + 1) * self.lanes // self.world)):
            rng = np.random.default_rng([self.seed, epoch, lane, window, 1])
            for m in apart:
                size = self.total[m] // self.lanes
                places = rng.permutation((hi - lo) * size).reshape(hi - lo, size)
                mine = places[:, max(self.rank * self.sizes[m] - lane * size, 0) :]
                mine = mine[:, : (self.rank + 1) * self.sizes[m] - max(self.rank * self.sizes[m], lane * size)]
                read, base = np.sort(mine, axis=None), (lane * len(self) + lo) * size
                mix[m].append(np.searchsorted(read, mine) + sum(map(len, rows[m])))
                rows[m].append(self.orders[m].span(epoch, base, base + (hi - lo) * size)[read])
        found = {m: np.concatenate(r) for m, r in rows.items()}
        order = {m: torch.from_numpy(np.concatenate(o, axis=1).reshape(-1)) for m, o in mix.items()}
        if self.paired:
            return dict.fromkeys(self.names, found[apart[0]]), dict.fromkeys(self.names, order[apart[0]])
        return found, order

    def _ordered(self) -> Iterator[Tokens]:
        parts = self.world * len(self)
        for b in range(len(self)):
            at = b * self.world + self.rank
            rows = {m: o.span(None, len(o) * at // parts, len(o) * (at + 1) // parts) for m, o in self.orders.items()}
            if self.resident is not None:
                yield self._named(rows, *self.resident.rows(self.resident.numbers(rows)))
                continue
            x = {m: self.store.rows(n, rows[m], dtype=None) for m, n in self.names.items()}
            self._check(x)
            yield self.store.tokens(self.names, rows, self.uids, x, self.store.gradients(self.names, rows))

    def _check(self, x: Mapping[str, Tensor]) -> None:
        if self.store.spec.nbytes >= AUTO_VERIFY_BYTES:
            for m, rows in x.items():
                self._refuse(m, len(not_finite(rows)), len(rows))


def _of_lanes(order: Mapping[str, Any]) -> dict[str, Any]:
    """The order of a state; in those of earlier versions every rank read a part of the epoch of its own."""
    if "lanes" in order:
        return dict(order)
    lanes = order["world"]
    return {**order, "lanes": lanes, "rows": {m: s * lanes for m, s in order["sizes"].items()}}
