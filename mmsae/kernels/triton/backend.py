"""The backend of CUDA devices: torch's products of matrices, and Triton kernels for what is done with them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mmsae.kernels.backend import Backend, Ranking
from mmsae.kernels.plain import TorchBackend
from mmsae.kernels.triton import select, sparse

ENTRIES = 2**28  # of a product that are held at a time
# sparse products of N * k * d operations and dense ones of N * F * d, in float32: those wait for the L2 cache, which
# gives an H100 some 1.4e12 float32 numbers a second, these do 25e12 a second
DENSE = 16


class TritonBackend(TorchBackend):
    """Triton kernels, deterministic; sums are float32. Of equal scores the first latents are chosen."""

    name = "triton"
    fused = True
    whole = 8  # 16 bytes of bfloat16, which tensor cores ask of the rows of a matrix

    def chunks(self, n: int, width: int, device: torch.device) -> Iterator[slice]:
        size = max(256, ENTRIES // width)
        yield from (slice(start, min(start + size, n)) for start in range(0, n, size))

    def topk(self, matrix: Tensor, k: int, ranking: Ranking | None = None) -> tuple[Tensor, Tensor]:
        ranking = ranking or Ranking()
        return select.topk(matrix, k, ranking.absolute, ranking.factor)

    def marked(self, matrix: Tensor, k: int) -> Tensor:
        return Backend.marked(self, matrix, k)

    def dense_pays(self, device: torch.device, n_rows: int, k: int) -> bool:
        return n_rows <= DENSE * k

    def threshold(self, scores: Tensor, budget: int) -> Tensor:
        return select.batch_threshold(scores, budget)

    def above(
        self, scores: Tensor, threshold: Tensor, least: int = 1, inclusive: bool = False
    ) -> tuple[Tensor, Tensor]:
        threshold = threshold.reshape(()) if threshold.numel() == 1 else threshold
        most = int(select.count_above(scores, threshold, inclusive).max()) if len(scores) else 0
        return select.above(scores, threshold, min(max(least, most), scores.shape[1]), inclusive)

    def group_max(self, matrix: Tensor, groups: int) -> Tensor:
        return select.group_max(matrix, groups)[1]

    def bag(self, values: Tensor, indices: Tensor, table: Tensor, bias: Tensor | None = None) -> Tensor:
        return sparse.bag(values, indices, table, bias).to(table.dtype)

    def sampled(self, x: Tensor, table: Tensor, indices: Tensor) -> Tensor:
        return sparse.sampled(x, table, indices).to(x.dtype)

    def segments(self, indices: Tensor, n_rows: int) -> sparse.Segments:
        return sparse.segments(indices, n_rows)

    def scatter(self, values: Tensor, indices: Tensor, x: Tensor, n_rows: int) -> Tensor:
        return sparse.scatter(values, indices, x, n_rows, self.sorted(indices, n_rows)).to(x.dtype)

    def scatter_and_totals(self, values: Tensor, indices: Tensor, x: Tensor, n_rows: int) -> tuple[Tensor, Tensor]:
        totals = values.new_empty(n_rows, dtype=torch.float32)
        sums = sparse.scatter(values, indices, x, n_rows, self.sorted(indices, n_rows), totals)
        return sums.to(x.dtype), totals.to(values.dtype)

    def totals(self, values: Tensor, indices: Tensor, n_rows: int) -> Tensor:
        # not index_add_, whose order of summation is another one in every run
        return self.scatter(values, indices, values.new_ones(len(values), 1), n_rows)[:, 0]
