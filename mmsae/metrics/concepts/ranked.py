"""Sparse codes latent by latent, each latent's rows by falling value: the matrix's columns sorted, and no matrix."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mmsae.metrics.concepts.evidence import lexsort
from mmsae.types import Codes


class Ranked(NamedTuple):
    """The E entries of codes that are not 0."""

    start: Tensor  #: ``(d_sae + 1,)`` int64 where each latent's entries begin
    latent: Tensor  #: ``(E,)`` int64, ascending
    row: Tensor  #: ``(E,)`` int64
    value: Tensor  #: ``(E,)``, descending within a latent; equal ones by row

    def of(self, lo: int, hi: int) -> Ranked:
        """Those of the latents from ``lo`` up to ``hi``, which are numbered from 0."""
        a, b = int(self.start[lo]), int(self.start[hi])
        return Ranked(self.start[lo : hi + 1] - a, self.latent[a:b] - lo, self.row[a:b], self.value[a:b])


def ranked(codes: Codes) -> Ranked:
    """The entries of codes, by two sorts of as many numbers as there are entries."""
    v = codes.values.detach()
    row, col = (v != 0).nonzero(as_tuple=True)  # by row, and sorts are stable
    latent, value = codes.ids()[row, col], v[row, col]
    order = lexsort(latent, -value)
    start = torch.nn.functional.pad(torch.bincount(latent, minlength=codes.d_sae).cumsum(0), (1, 0))
    return Ranked(start, latent[order], row[order], value[order])
