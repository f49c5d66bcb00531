"""Torch's own operations: the backend of the CPU, and of any device that has no other.

``bag`` and ``scatter`` are ``embedding_bag``, ``sampled`` is ``sampled_addmm``: on CPU 40 to 80 times faster than
gather and einsum, and both run on CUDA. Everything is deterministic on CPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mmsae.kernels import grouped
from mmsae.kernels.backend import Ranking
from mmsae.kernels.gradients import SparseBackend

# said once per process at the first CSR tensor, which here is an implementation detail
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")

# sparse products of N * k * d operations and dense ones of N * F * d: on the CPU the dense ones do 5 times as many a
# second, forward and backward together (20 against 100 GFLOP/s of a core)
DENSE = 4

# torch's linear runs on MKL, which uses AVX2 on AMD; oneDNN uses AVX-512 there and is 2.4 times as fast
# (benchmarks/train_step.py). The choice follows the processor and not a timing, since a run that is resumed must repeat
# its bits.
_ONEDNN = (
    torch.backends.mkldnn.is_available()
    and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)

NATIVE_BF16 = _ONEDNN and any(
    getattr(torch.cpu, f"_is_{name}_supported", bool)() for name in ("avx512_bf16", "amx_tile")
)
"""Whether the processor multiplies bfloat16, and sums in float32."""


def _by_onednn(x: Tensor, weight: Tensor) -> bool:
    known = x.dtype == weight.dtype and (x.dtype == torch.float32 or (NATIVE_BF16 and x.dtype == torch.bfloat16))
    return _ONEDNN and known and x.device.type == "cpu" and x.numel() > 0


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias`` outside autograd, by the fastest exact product."""
    if _by_onednn(x, weight):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def scaled(product: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """``product * scale + bias``, in place; None: nothing is multiplied or added."""
    product = product if scale is None else product.mul_(scale)
    return product if bias is None else product.add_(bias)


def row_chunks(n: int, width: int, device: torch.device) -> Iterator[slice]:
    """So many of n rows at a time as a product with ``width`` columns is fast for on the device."""
    # 256 rows keep the product in cache and under the allocator's mmap limit on CPU; a GPU wants large products
    size = 256 if device.type == "cpu" else max(256, 2**28 // width)
    yield from (slice(start, min(start + size, n)) for start in range(0, n, size))


@contextmanager
def tf32() -> Iterator[None]:
    """Products of float32 matrices on CUDA round their operands to TF32 here, and nowhere else."""
    matmul = torch.backends.cuda.matmul
    name, on = ("fp32_precision", "tf32") if hasattr(matmul, "fp32_precision") else ("allow_tf32", True)
    before = getattr(matmul, name)
    setattr(matmul, name, on)
    try:
        yield
    finally:
        setattr(matmul, name, before)


class Segments(NamedTuple):
    """The entries of a batch in the order of their latents."""

    order: Tensor  #: ``(N * k,)`` entries.
    rows: Tensor  #: ``(N * k,)`` their rows.
    offsets: Tensor  #: ``(n_rows,)`` where each latent's begin.

    @classmethod
    def of(cls, latents: Tensor, rows: Tensor, n_rows: int) -> Segments:
        """Of entries with these latents and rows."""
        # stable, so that the order of summation (and with it every bit of the result) does not depend on the sort
        order = latents.to(torch.int32).sort(stable=True).indices
        counts = torch.bincount(latents, minlength=n_rows)
        return cls(order, rows.index_select(0, order), counts.cumsum(0) - counts)


def by_latent(x: Tensor, table: Tensor, segments: Segments) -> Tensor:
    """Inner products of rows of ``x (N, d)`` and of ``table (F, d)`` at the entries of a batch, in their own order."""
    edges = F.pad(segments.offsets, (0, 1), value=len(segments.order))
    products = _sampled(table, x, edges, segments.rows)
    return torch.empty_like(products).index_copy_(0, segments.order, products)


def _sampled(x: Tensor, table: Tensor, edges: Tensor, indices: Tensor) -> Tensor:
    """Inner products of rows of x and of rows of ``table``; those of row n are ``indices[edges[n] : edges[n + 1]]``."""
    zeros = x.new_zeros(len(indices))
    pattern = torch.sparse_csr_tensor(edges, indices, zeros, size=(len(x), len(table)), check_invariants=False)
    return torch.sparse.sampled_addmm(pattern, x, table.t(), beta=0.0).values()


class TorchBackend(SparseBackend):
    """Torch's operations, for every device."""

    name = "torch"
    whole = 64  # oneDNN compiles for every shape, and keeps what it compiled for a thousand of them

    def chunks(self, n: int, width: int, device: torch.device) -> Iterator[slice]:
        return row_chunks(n, width, device)

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None, precision: str = "fp32") -> Tensor:
        if precision == "bf16":
            return linear(x.bfloat16(), weight.bfloat16(), None if bias is None else bias.bfloat16())
        if precision == "tf32":
            with tf32():
                return F.linear(x, weight, bias)
        return linear(x, weight, bias)

    def dense_product(self, x: Tensor, weight: Tensor, precision: str = "fp32") -> Tensor:
        if precision == "fp32" and not _by_onednn(x, weight):
            return F.linear(x, weight)
        return super().dense_product(x, weight, precision)

    def dense_pays(self, device: torch.device, n_rows: int, k: int) -> bool:
        return device.type == "cpu" and n_rows <= DENSE * k

    def topk(self, matrix: Tensor, k: int, ranking: Ranking | None = None) -> tuple[Tensor, Tensor]:
        ranked = matrix if ranking is None else ranking(matrix)
        if grouped.pays(ranked.device, ranked.shape[1], k):
            values, indices = grouped.topk(ranked, k)
        else:
            values, indices = ranked.topk(k, dim=1, sorted=False)
        return values if ranking is None else matrix.gather(1, indices), indices

    def marked(self, matrix: Tensor, k: int) -> Tensor:
        return grouped.marked(matrix, k) if matrix.device.type == "cpu" else super().marked(matrix, k)

    def threshold(self, scores: Tensor, budget: int) -> Tensor:
        best = scores.reshape(-1).topk(min(budget, scores.numel()), sorted=False).values
        return torch.where(best > 0, best, torch.inf).min() if len(best) else scores.new_full((), torch.inf)

    def above(
        self, scores: Tensor, threshold: Tensor, least: int = 1, inclusive: bool = False
    ) -> tuple[Tensor, Tensor]:
        if grouped.pays(scores.device, scores.shape[1]):
            return grouped.above(scores, threshold, least, inclusive)
        threshold = threshold.reshape(-1)  # 0-dim numbers would be rounded to the scores' precision
        on = scores >= threshold if inclusive else scores > threshold
        most = int(on.sum(1).max()) if len(on) else 0
        ids = torch.where(on, scores, -torch.inf).topk(min(max(least, most), scores.shape[1]), dim=1).indices
        return ids, on.gather(1, ids)

    def group_max(self, matrix: Tensor, groups: int) -> Tensor:
        parts = matrix.unflatten(1, (groups, -1))
        return parts.argmax(2) + torch.arange(groups, device=matrix.device) * parts.shape[2]

    def bag(self, values: Tensor, indices: Tensor, table: Tensor, bias: Tensor | None = None) -> Tensor:
        out = F.embedding_bag(indices, table, mode="sum", per_sample_weights=values.to(table.dtype))
        return out if bias is None else out.add_(bias)

    def sampled(self, x: Tensor, table: Tensor, indices: Tensor) -> Tensor:
        n, k = indices.shape
        if x.device.type == "cpu" and len(table) > n:  # rows of the larger one are read in their order
            return by_latent(x, table, self.sorted(indices, len(table))).view(n, k)
        edges = torch.arange(0, n * k + 1, k, device=x.device)
        return _sampled(x, table, edges, indices.reshape(-1)).view(n, k)

    def segments(self, indices: Tensor, n_rows: int) -> Segments:
        n, k = indices.shape
        rows = torch.arange(n, device=indices.device).unsqueeze(1).expand(n, k).reshape(-1)
        return Segments.of(indices.reshape(-1), rows, n_rows)

    def scatter(self, values: Tensor, indices: Tensor, x: Tensor, n_rows: int) -> Tensor:
        segments: Segments = self.sorted(indices, n_rows)
        weights = values.reshape(-1).index_select(0, segments.order).to(x.dtype)
        return F.embedding_bag(segments.rows, x, offsets=segments.offsets, mode="sum", per_sample_weights=weights)

    def totals(self, values: Tensor, indices: Tensor, n_rows: int) -> Tensor:
        return values.new_zeros(n_rows).index_add_(0, indices.reshape(-1), values.reshape(-1))
