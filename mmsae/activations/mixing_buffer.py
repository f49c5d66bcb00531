"""Mix activations that come in the order of a stream, in bounded memory and on the device they are on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from mmsae.device import sent
from mmsae.types import InputError, SideBySide, Tokens

CARRIED = ("x", "grad", "special", "role")  # fields of Tokens that a row keeps
Column = tuple[str, str]  # modality and field
Groups = Mapping[str, Mapping[Column, Tensor]]  # of what stays together: one entry or vector for every row


class MixingBuffer:
    """Collects rows until it is full, then gives a random batch for every batch that comes in.

    The unit is the pair where the incoming :class:`~mmsae.types.Tokens` are paired (row i of every modality is one
    item, and stays so). Otherwise modalities are mixed independently and a batch has a fixed quota of rows of each, so
    that the mean over ranks is the global mean; rows of a modality that fills up faster than its quota uses it are
    dropped as they come in.

    Args:
        capacity: Units held (token sites: rows per modality). Rows of batches between which ``capacity`` units come in
            are hardly mixed, so take several times the number of units that belong together.
        batch_size: Units per batch.
        seed: Seed of the draws.
        quotas: ``{modality: rows per batch}`` for token sites; ``batch_size`` for each by default.
        half: Give batches until the buffer is half empty, then fill it up (FAST, arXiv 2506.07691), in place of making
            room for what comes in and no more.

    Raises:
        InputError: A batch is larger than the buffer.
    """

    def __init__(
        self,
        capacity: int,
        batch_size: int,
        seed: int = 0,
        quotas: Mapping[str, int] | None = None,
        half: bool = False,
    ) -> None:
        if max([batch_size, *(quotas or {}).values()]) > capacity:
            raise InputError(
                f"buffer: its capacity is {capacity}, a batch of {batch_size} {dict(quotas or {})} needs more"
            )
        self.capacity, self.batch_size, self.quotas, self.half = capacity, batch_size, dict(quotas or {}), half
        self._generator = torch.Generator().manual_seed(seed)
        self._pools: dict[str, _Pool] = {}

    def mix(self, stream: Iterable[Tokens], drain: bool = True) -> Iterator[Tokens]:
        """Batches of mixed rows with their gradients and flags; positions and uids are not kept.

        At the end of the stream ``drain`` gives what is left (the last batch may be smaller) instead of dropping it.
        """
        for tokens in stream:
            yield from self.take_in(self.groups(tokens))
        while drain and self._pools and all(p.n for p in self._pools.values()):
            yield self._take()

    def __len__(self) -> int:
        """Units held now (token sites: of the fullest modality)."""
        return max((p.n for p in self._pools.values()), default=0)

    def take_in(self, groups: Groups) -> Iterator[Tokens]:
        """Add what came in, and give the batches that have to make room for it."""
        step = max(1, self.capacity - max(self._quota(g) for g in groups) + 1)
        for lo in range(0, max(len(next(iter(x.values()))) for x in groups.values()), step):
            yield from self._push({g: {m: v[lo : lo + step] for m, v in x.items()} for g, x in groups.items()})

    def groups(self, tokens: Tokens) -> Groups:
        """What of a batch stays together."""
        items = next(iter(tokens.item.values()))
        columns = {m: {(m, c): v[m] for c in CARRIED if (v := getattr(tokens, c)) and m in v} for m in tokens.x}
        # Token sites may have as many rows of every modality by chance: those are no pairs.
        if len(tokens.x) == 1 or (tokens.paired() and len(items.unique()) == len(items)):
            return {"": {k: v for own in columns.values() for k, v in own.items()}}
        return columns

    def _quota(self, group: str) -> int:
        return self.quotas.get(group, self.batch_size)

    def _push(self, groups: Groups) -> Iterator[Tokens]:
        for g, x in groups.items():
            if g not in self._pools:
                self._pools[g] = _Pool({c: v.new_empty(self.capacity, *v.shape[1:]) for c, v in x.items()})
        if set(groups) != set(self._pools):
            raise InputError("buffer: a stream of pairs turned into a stream of unpaired rows")
        ready = lambda: all(p.n >= self._quota(g) for g, p in self._pools.items())  # noqa: E731
        full = lambda: any(p.room() < len(next(iter(groups[g].values()))) for g, p in self._pools.items())  # noqa: E731
        while full() and ready():
            yield self._take()
            while self.half and ready() and all(2 * p.n > self.capacity for p in self._pools.values()):
                yield self._take()
        for g, x in groups.items():
            self._pools[g].add(x)

    def _take(self) -> Tokens:
        out: dict[str, dict[str, Tensor]] = {c: {} for c in CARRIED}
        for g, pool in self._pools.items():
            rows = pool.take(torch.randperm(pool.n, generator=self._generator)[: self._quota(g)])
            for (m, column), v in rows.items():
                out[column][m] = v
        return Tokens.pooled(out.pop("x"))._replace(**{c: v for c, v in out.items() if v})


def mix_side_by_side(buffers: Mapping[str, MixingBuffer], stream: Iterable[SideBySide]) -> Iterator[SideBySide]:
    """Batches of several choices of sites, of which each has a buffer for itself and what it would get alone.

    Raises:
        InputError: One has more rows of a batch than another, so that it would need other batches of the host.
    """
    for batch in stream:
        groups = {sites: buffers[sites].groups(tokens) for sites, tokens in batch.of.items()}
        rows = {sites: [len(next(iter(x.values()))) for x in own.values()] for sites, own in groups.items()}
        first, *others = rows
        if odd := [sites for sites in others if rows[sites] != rows[first]]:
            counts = [" and ".join(map(str, rows[sites])) for sites in (first, odd[0])]
            raise InputError(
                f"the sites {first} give {counts[0]} rows of a batch of the host, {odd[0]} give {counts[1]}: SAEs on "
                "one stream read at sites with equally many rows; mmsae extract stores them for any SAEs"
            )
        for taken in zip(*(buffers[sites].take_in(own) for sites, own in groups.items()), strict=True):
            yield SideBySide(dict(zip(groups, taken, strict=True)))


class _Pool:
    """``{column: (capacity, ...)}`` of which the first ``n`` rows are in use."""

    def __init__(self, rows: dict[Column, Tensor]) -> None:
        self.rows, self.n = rows, 0

    def room(self) -> int:
        return len(next(iter(self.rows.values()))) - self.n

    def add(self, x: Mapping[Column, Tensor]) -> None:
        n = min(self.room(), len(next(iter(x.values()))))
        for m, v in x.items():
            self.rows[m][self.n : self.n + n] = v[:n]
        self.n += n

    def take(self, pick: Tensor) -> dict[Column, Tensor]:
        """Remove the rows ``pick`` and close the holes with rows from the end."""
        left = self.n - len(pick)
        used = torch.zeros(self.n, dtype=torch.bool)
        used[pick] = True
        holes, movers = used[:left].nonzero()[:, 0], (~used[left:]).nonzero()[:, 0] + left
        out, device = {}, next(iter(self.rows.values())).device
        pick, holes, movers = (sent(t, device) for t in (pick, holes, movers))
        for m, v in self.rows.items():
            out[m] = v.index_select(0, pick)
            v[holes] = v[movers]
        self.n = left
        return out
