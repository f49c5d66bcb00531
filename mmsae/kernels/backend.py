"""What an SAE asks of a machine: the encoder's product, the selection of its entries, and sparse products.

A :class:`Backend` is one way to do all of it. There are three: ``reference`` (dense formulas, whose gradients are
torch's own), ``torch`` (torch's operations: the CPU, and any GPU) and ``triton`` (compiled kernels on CUDA).
:mod:`mmsae.kernels.choice` says which is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

Score = Callable[[Tensor, slice], Tensor]
"""What is ranked, as a function of some rows' entries ``(n, F)`` and of which rows they are."""


@dataclass(frozen=True)
class Ranking:
    """A score that kernels can see through: entries times a factor of their column, or the absolute value of that."""

    absolute: bool = False  #: Whether the absolute value counts.
    factor: Tensor | None = None  #: ``(F,)``, or None (1).

    def __call__(self, entries: Tensor, rows: slice = slice(None)) -> Tensor:
        entries = entries if self.factor is None else entries * self.factor
        return entries.abs() if self.absolute else entries

    def times(self, factor: Tensor) -> Ranking:
        """The ranking of entries that have yet to be multiplied by ``factor (F,)``."""
        return Ranking(self.absolute, factor if self.factor is None else factor * self.factor)


class Backend:
    """One way to compute an SAE's products and selections.

    N rows of width d, F latents, k entries a row. Ids within a row are distinct, in any order, int64.
    """

    name: ClassVar[str]
    #: Whether the whole product of a batch is one matrix that its kernels rank as it is. Rows of several modalities
    #: that share an encoder are then coded together, and a batch's budget is found by its threshold.
    fused: ClassVar[bool] = False
    #: Products whose number of latents changes from step to step are filled up to a multiple of this many.
    whole: ClassVar[int] = 1

    def chunks(self, n: int, width: int, device: torch.device) -> Iterator[slice]:
        """So many of n rows at a time as a product with ``width`` columns is fast for."""
        raise NotImplementedError

    # ------------------------------------------------------------------------------------------ without gradients
    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None, precision: str = "fp32") -> Tensor:
        """``(N, F)`` ``x @ weight.T + bias`` of ``x (N, d)``, ``weight (F, d)`` and ``bias (F,)``.

        ``precision`` is that of the operands: ``fp32``, ``tf32`` (on CUDA) or ``bf16``, whose result is bfloat16; sums
        are float32.
        """
        raise NotImplementedError

    def topk(self, matrix: Tensor, k: int, ranking: Ranking | None = None) -> tuple[Tensor, Tensor]:
        """``(values of matrix, ids)``, both ``(N, k)``, of the k largest of a row by ``ranking`` (default: value)."""
        raise NotImplementedError

    def marked(self, matrix: Tensor, k: int) -> Tensor:
        """``(N, F)`` 1 for the k largest of each row of ``matrix (N, F)``, 0 for the others, in its precision."""
        return torch.zeros_like(matrix).scatter_(1, self.topk(matrix, k)[1], 1.0)

    def threshold(self, scores: Tensor, budget: int) -> Tensor:
        """The ``budget``-th largest positive entry of ``scores (N, F)``, 0-dim; ``budget`` is at least 1.

        The smallest positive one where there are fewer; infinity where there is none.
        """
        raise NotImplementedError

    def above(
        self, scores: Tensor, threshold: Tensor, least: int = 1, inclusive: bool = False
    ) -> tuple[Tensor, Tensor]:
        """``(ids, whether they count)``, both ``(N, K)``, of the entries above a threshold, one or ``(F,)``.

        With ``inclusive`` also of those that are equal to it. K is the most that a row has, and at least ``least``. Ids
        that do not count are others of the row. This is the one operation that waits for the device.
        """
        raise NotImplementedError

    def group_max(self, matrix: Tensor, groups: int) -> Tensor:
        """``(N, groups)`` ids of the largest entry of each of so many groups of neighbouring columns."""
        raise NotImplementedError

    # --------------------------------------------------------------------------------------------- differentiable
    def decode(self, values: Tensor, indices: Tensor, atoms: Tensor, bias: Tensor | None = None) -> Tensor:
        """``(N, d)`` sums of ``atoms (F, d)`` weighted by ``values (N, k)`` at ``indices (N, k)``, plus ``bias``."""
        raise NotImplementedError

    def entries(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        indices: Tensor,
        values: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> Tensor:
        """``(N, k)`` entries ``indices`` of ``(x @ weight.T) * scale + bias``; see :func:`sampled_linear`."""
        raise NotImplementedError

    def sums(self, values: Tensor, indices: Tensor, x: Tensor, n_rows: int) -> Tensor:
        """``(n_rows, d)`` sums by latent of ``x (N, d)`` weighted by ``values (N, k)`` at ``indices (N, k)``."""
        raise NotImplementedError

    def dense_pays(self, device: torch.device, n_rows: int, k: int) -> bool:
        """Whether codes of k entries a row are decoded faster as matrices that are mostly 0, with their gradients."""
        return False

    def dense_product(self, x: Tensor, weight: Tensor, precision: str = "fp32") -> Tensor:
        """``(N, F)`` ``x @ weight.T`` in the precision of x, its operands in that of ``precision``."""
        raise NotImplementedError
