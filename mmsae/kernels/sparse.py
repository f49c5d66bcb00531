"""Products of a k-sparse code with a dictionary, and their exact gradients.

Three primitives, each touching N*k rows of width d instead of a dense (N, d_sae) matrix:

* ``bag``: ``out[n] = sum_j v[n, j] * table[idx[n, j]]``;
* ``sampled``: ``out[n, j] = <x[n], table[idx[n, j]]>``;
* ``scatter``: ``out[f] = sum over (n, j) with idx[n, j] = f of v[n, j] * x[n]``.

Each is the gradient of another, so decoding and encoding of selected entries need nothing else. ``bag`` and
``scatter`` are ``embedding_bag``, ``sampled`` is ``sampled_addmm``: on CPU 40 to 80 times faster than gather and
einsum, and both run on CUDA. Everything is deterministic on CPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

# said once per process at the first CSR tensor, which here is an implementation detail
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")

# torch's linear runs on MKL, which uses AVX2 on AMD; oneDNN uses AVX-512 there and is 2.4 times as fast
# (benchmarks/sae_step.py). The choice follows the processor and not a timing, since a run that is resumed must repeat
# its bits.
_ONEDNN = (
    torch.backends.mkldnn.is_available()
    and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias`` outside autograd, by the fastest exact product."""
    if _ONEDNN and x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and x.numel():
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def _bag(values: Tensor, indices: Tensor, table: Tensor) -> Tensor:
    return F.embedding_bag(indices, table, mode="sum", per_sample_weights=values.to(table.dtype))


def _sampled(x: Tensor, table: Tensor, indices: Tensor) -> Tensor:
    n, k = indices.shape
    crow = torch.arange(0, n * k + 1, k, device=x.device)
    pattern = torch.sparse_csr_tensor(
        crow, indices.reshape(-1), x.new_zeros(n * k), size=(n, len(table)), check_invariants=False
    )
    return torch.sparse.sampled_addmm(pattern, x, table.t(), beta=0.0).values().view(n, k)


def _scatter(values: Tensor, indices: Tensor, x: Tensor, n_rows: int) -> Tensor:
    flat = indices.reshape(-1)
    # stable, so that the order of summation (and with it every bit of the result) does not depend on the sort
    order = flat.to(torch.int32).sort(stable=True).indices
    counts = torch.bincount(flat, minlength=n_rows)
    return F.embedding_bag(
        order // indices.shape[1],
        x,
        offsets=counts.cumsum(0) - counts,
        mode="sum",
        per_sample_weights=values.reshape(-1)[order].to(x.dtype),
    )


class _SparseDecode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: Tensor, indices: Tensor, atoms: Tensor) -> Tensor:
        ctx.save_for_backward(values, indices, atoms)
        return _bag(values, indices, atoms)

    @staticmethod
    def backward(ctx, grad: Tensor):
        values, indices, atoms = ctx.saved_tensors
        grad = grad.contiguous()
        need_values, _, need_atoms = ctx.needs_input_grad
        return (
            _sampled(grad, atoms, indices).to(values.dtype) if need_values else None,
            None,
            _scatter(values, indices, grad, len(atoms)) if need_atoms else None,
        )


class _SampledLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, indices, values, scale):
        if values is None:
            values = _sampled(x, weight, indices)
            values = values if scale is None else values * scale[indices]
            values = values if bias is None else values + bias[indices]
        else:
            values = values.clone()
        ctx.save_for_backward(x, weight, bias, indices, values, scale)
        return values

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight, bias, indices, values, scale = ctx.saved_tensors
        need_x, need_w, need_b, _, _, need_s = ctx.needs_input_grad
        grad = grad.contiguous()

        def per_latent(v: Tensor) -> Tensor:
            return weight.new_zeros(len(weight)).index_add_(0, indices.reshape(-1), v.reshape(-1))

        grad_b = per_latent(grad) if need_b else None
        grad_s = None
        if scale is not None:
            factor = scale[indices]
            if need_s:
                product = (values if bias is None else values - bias[indices]) / factor
                grad_s = per_latent(grad * product)
            grad = grad * factor
        return (
            _bag(grad, indices, weight) if need_x else None,
            _scatter(grad, indices, x, len(weight)) if need_w else None,
            grad_b,
            None,
            None,
            grad_s,
        )


def sparse_decode(values: Tensor, indices: Tensor, atoms: Tensor) -> Tensor:
    """``(N, d)`` sums of ``atoms (F, d)`` rows weighted by ``values (N, k)`` at ``indices (N, k)``; differentiable."""
    return _SparseDecode.apply(values, indices, atoms)


class _SparseScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: Tensor, indices: Tensor, x: Tensor, n_rows: int) -> Tensor:
        ctx.save_for_backward(values, indices, x)
        return _scatter(values, indices, x, n_rows)

    @staticmethod
    def backward(ctx, grad: Tensor):
        values, indices, x = ctx.saved_tensors
        grad = grad.contiguous()
        need_values, _, need_x, _ = ctx.needs_input_grad
        return (
            _sampled(x, grad, indices).to(values.dtype) if need_values else None,
            None,
            _bag(values, indices, grad) if need_x else None,
            None,
        )


def sparse_scatter(values: Tensor, indices: Tensor, x: Tensor, n_rows: int) -> Tensor:
    """``(n_rows, d)`` for each latent the sum of ``x (N, d)`` weighted by its values; differentiable.

    That is ``codes.T @ x`` of codes ``values (N, k)`` at ``indices (N, k)``.
    """
    return _SparseScatter.apply(values, indices, x, n_rows)


def sampled_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    indices: Tensor,
    values: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """``(N, k)`` entries ``indices`` of ``(x @ weight.T) * scale + bias``, with gradients for these entries only.

    Args:
        x: ``(N, d)`` inputs.
        weight: ``(F, d)``.
        bias: ``(F,)`` or None.
        indices: ``(N, k)`` columns wanted of each row.
        values: The entries themselves where they are known already (from the product that chose them).
        scale: ``(F,)`` factor of each column, not 0, or None.
    """
    return _SampledLinear.apply(x, weight, bias, indices, values, scale)


def row_chunks(n: int, width: int, device: torch.device) -> Iterator[slice]:
    """So many of n rows at a time as a product with ``width`` columns is fast for on the device."""
    # 256 rows keep the product in cache and under the allocator's mmap limit on CPU; a GPU wants large products
    size = 256 if device.type == "cpu" else max(256, 2**28 // width)
    yield from (slice(start, min(start + size, n)) for start in range(0, n, size))


def _products(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """``(rows, their part of (x @ weight.T) * scale + bias)``, so many rows at a time as are fast on the device."""
    for rows in row_chunks(len(x), len(weight), x.device):
        product = linear(x[rows], weight, bias if scale is None else None)
        if scale is not None:
            product.mul_(scale)
            if bias is not None:
                product.add_(bias)
        yield rows, product


@torch.no_grad()
def chunked_topk(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: int,
    score: Callable[[Tensor, slice], Tensor] | None = None,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The k largest entries of each row of ``(x @ weight.T) * scale + bias``, without keeping the (N, F) product.

    Shapes are those of :func:`sampled_linear`. ``score(product, rows)`` is what is ranked, as a function of the product
    of some rows (default: itself).

    Returns:
        ``(values, indices)``, both ``(N, k)``; values are entries of the product, not scores.
    """
    values, indices = [], []
    for rows, product in _products(x, weight, bias, scale):
        if score is None:
            val, idx = product.topk(k, dim=1, sorted=False)
        else:
            idx = score(product, rows).topk(k, dim=1, sorted=False).indices
            val = product.gather(1, idx)
        values.append(val)
        indices.append(idx)
    if not values:
        return x.new_zeros(0, k), torch.zeros(0, k, dtype=torch.long, device=x.device)
    return torch.cat(values), torch.cat(indices)


@torch.no_grad()
def chunked_above(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    threshold: Tensor,
    score: Callable[[Tensor, slice], Tensor] | None = None,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The entries of ``(x @ weight.T) * scale + bias`` whose score is above a threshold, without the (N, F) product.

    ``threshold`` is one number or ``(F,)``. Rows with fewer entries than the fullest one are filled with other ids,
    which do not count.

    Returns:
        ``(values, indices, kept)``, all ``(N, k)`` with k the most entries of a row, at least 1.
    """
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    k = 1
    for rows, product in _products(x, weight, bias, scale):
        ranked = product if score is None else score(product, rows)
        on = ranked > threshold
        k = max(k, int(on.sum(1).max()))
        ranked = torch.where(on, ranked, -torch.inf)
        idx = ranked.topk(min(max(k, 1), len(weight)), dim=1).indices
        parts.append((product.gather(1, idx), idx, on.gather(1, idx)))
    if not parts:
        empty = torch.zeros(0, 1, dtype=torch.long, device=x.device)
        return x.new_zeros(0, 1), empty, empty.bool()
    return _widened(parts, k, len(weight))


def _widened(parts: list[tuple[Tensor, Tensor, Tensor]], k: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Below each other, the narrower ones filled up with ids that their rows have not."""
    values, indices, kept = [], [], []
    for val, idx, on in parts:
        missing = k - idx.shape[1]
        if missing:
            taken = idx.new_zeros(len(idx), k + 1).scatter_(1, idx.clamp(max=k), 1)[:, :k]
            idx = torch.cat([idx, taken.sort(dim=1, stable=True).indices[:, :missing]], 1)
            val, on = (F.pad(t, (0, missing)) for t in (val, on))
        values.append(val)
        indices.append(idx)
        kept.append(on)
    return torch.cat(values), torch.cat(indices), torch.cat(kept)
