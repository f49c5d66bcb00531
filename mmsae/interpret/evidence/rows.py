"""What fires in the rows of a batch: entries of items, latents, places and values, and the words of texts."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mmsae.interpret.evidence.marks import SampleMarks
from mmsae.metrics.concepts.evidence import lexsort, run_starts
from mmsae.types import ImageTextBatch


class FiredRows(NamedTuple):
    """What fires in the rows of B items of one modality, by item, latent and position."""

    item: Tensor  #: ``(E,)`` int64, place in the batch
    latent: Tensor  #: ``(E,)`` int64
    position: Tensor  #: ``(E,)`` int64, see :class:`mmsae.interpret.evidence.folder.Grid`
    value: Tensor  #: ``(E,)`` float32
    grid: Tensor  #: ``(B, 2) int32`` rows and columns of every item's places; 0 where they are no grid
    rows: int  #: Rows of all items
    places: int  #: Largest number of places of an item

    def of(self, keep: Tensor) -> FiredRows:
        """The entries of some items ``(B,) bool``, which are counted anew."""
        on = keep[self.item]
        return FiredRows((keep.cumsum(0) - 1)[self.item[on]], *(t[on] for t in self[1:4]), self.grid[keep], *self[5:])

    def pooled(self, d_sae: int) -> FiredRows:
        """One entry for every item and latent: that of largest absolute value, of the first row of those."""
        key = self.item * d_sae + self.latent
        order = lexsort(key, -self.value.abs())
        first = order[run_starts(key[order])]
        return FiredRows(*(t[first] for t in self[:4]), *self[4:])


class BatchWords(NamedTuple):
    """The tokens of B texts as they read, by item and position."""

    item: Tensor  #: ``(T,)`` int64, place in the batch
    position: Tensor  #: ``(T,)`` int64
    text: list[str]  #: T pieces, each with the white space before it

    def of(self, keep: Tensor) -> BatchWords:
        """The words of some items ``(B,) bool``, which are counted anew."""
        on = keep[self.item]
        at = on.nonzero()[:, 0].tolist()
        return BatchWords((keep.cumsum(0) - 1)[self.item[on]], self.position[on], [self.text[i] for i in at])


class Looked(NamedTuple):
    """What was found in a batch of n items."""

    batch: ImageTextBatch  #: The items
    marks: SampleMarks  #: Theirs
    fired: dict[str, FiredRows]  #: By modality
    embed: dict[str, Tensor]  #: ``{modality: (n, width) float32}`` unit embeddings, zeros where an item has none
    words: dict[str, BatchWords]  #: By modality, where its rows are tokens of a text

    def of(self, keep: Tensor) -> Looked:
        """Some of the items ``(n,) bool``."""
        keep = keep.cpu()
        if keep.all():
            return self
        at = keep.nonzero()[:, 0].tolist()
        columns = {f: [getattr(self.batch, f)[i] for i in at] for f in ("uids", "captions", "keys", "shards")}
        return Looked(
            self.batch._replace(**columns),
            SampleMarks(*([v[i] for i in at] if isinstance(v, list) else v[keep] for v in self.marks[:7])),
            {m: f.of(keep) for m, f in self.fired.items()},
            {m: e[keep] for m, e in self.embed.items()},
            {m: w.of(keep) for m, w in self.words.items()},
        )


def entries(
    item: Tensor, place: Tensor, values: Tensor, indices: Tensor | None, grid: Tensor, places: int, d_sae: int
) -> FiredRows:
    """The entries of codes ``values (N, k)`` of rows that lie at ``place (N,)`` of ``item (N,)``, on the CPU."""
    row, column = (values != 0).nonzero(as_tuple=True)
    latent = column if indices is None else indices[row, column]
    order = lexsort(item[row] * d_sae + latent, place[row])
    found = (item[row], latent, place[row], values[row, column].float())
    return FiredRows(*(t[order].cpu() for t in found), grid.int().cpu(), len(item), places)


def no_grid(n: int) -> Tensor:
    """The grid of n items whose places are none."""
    return torch.zeros(n, 2, dtype=torch.int32)
