"""Exact gradients of sparse products, made of three primitives, each of which is the gradient of another.

* ``bag``: ``out[n] = sum_j v[n, j] * table[idx[n, j]]``;
* ``sampled``: ``out[n, j] = <x[n], table[idx[n, j]]>``;
* ``scatter``: ``out[f] = sum over (n, j) with idx[n, j] = f of v[n, j] * x[n]``.

Each touches N*k rows of width d instead of a dense (N, F) matrix.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from mmsae.kernels.backend import Backend


class SparseBackend(Backend):
    """Base of backends that have the three primitives; shapes are those of :class:`Backend`."""

    def __init__(self) -> None:
        # by the tensor of ids: gradients of decoder and encoder are sums over the same ones, and need one sort
        self._sorted: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def bag(self, values: Tensor, indices: Tensor, table: Tensor, bias: Tensor | None = None) -> Tensor:
        """``(N, d)`` sums of rows of ``table (F, d)``, and of ``bias (d,)``."""
        raise NotImplementedError

    def sampled(self, x: Tensor, table: Tensor, indices: Tensor) -> Tensor:
        """``(N, k)`` inner products of rows of ``x (N, d)`` and of ``table (F, d)``."""
        raise NotImplementedError

    def segments(self, indices: Tensor, n_rows: int) -> Any:
        """Where each latent's entries are, for ``scatter``: a sort. It must not hold ``indices`` or a view of them."""
        raise NotImplementedError

    def scatter(self, values: Tensor, indices: Tensor, x: Tensor, n_rows: int) -> Tensor:
        """``(n_rows, d)`` sums by latent of rows of ``x (N, d)``, weighted; its sort is :meth:`sorted`'s."""
        raise NotImplementedError

    def totals(self, values: Tensor, indices: Tensor, n_rows: int) -> Tensor:
        """``(n_rows,)`` sums by latent of ``values (N, k)``."""
        raise NotImplementedError

    def scatter_and_totals(self, values: Tensor, indices: Tensor, x: Tensor, n_rows: int) -> tuple[Tensor, Tensor]:
        """:meth:`scatter` and :meth:`totals` of the same values."""
        return self.scatter(values, indices, x, n_rows), self.totals(values, indices, n_rows)

    def sorted(self, indices: Tensor, n_rows: int) -> Any:
        """The ``segments`` of a tensor of ids, made once for as long as the tensor lives and is not written to."""
        if indices.is_inference():  # has no version
            return self.segments(indices, n_rows)
        key = indices._version, n_rows
        found = self._sorted.get(indices)
        if found is None or found[0] != key:
            found = self._sorted[indices] = key, self.segments(indices, n_rows)
        return found[1]

    def decode(self, values: Tensor, indices: Tensor, atoms: Tensor, bias: Tensor | None = None) -> Tensor:
        return _Decode.apply(self, values, indices, atoms, bias)

    def entries(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        indices: Tensor,
        values: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> Tensor:
        if values is not None and not torch.is_grad_enabled():
            return values
        return _Entries.apply(self, x, weight, bias, indices, values, scale)

    def sums(self, values: Tensor, indices: Tensor, x: Tensor, n_rows: int) -> Tensor:
        return _Sums.apply(self, values, indices, x, n_rows)

    def dense_product(self, x: Tensor, weight: Tensor, precision: str = "fp32") -> Tensor:
        return _Product.apply(self, x, weight, precision)


def _picked(column: Tensor, indices: Tensor) -> Tensor:
    """``column[indices]``, which on the CPU takes five times as long."""
    return column.index_select(0, indices.reshape(-1)).view(indices.shape)


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend: SparseBackend, values: Tensor, indices: Tensor, atoms: Tensor, bias: Tensor | None):
        ctx.backend = backend  # the choice of a thread, and gradients are computed by another one on CUDA
        ctx.save_for_backward(values, indices, atoms)
        return backend.bag(values, indices, atoms, bias)

    @staticmethod
    def backward(ctx, grad: Tensor):
        backend, (values, indices, atoms) = ctx.backend, ctx.saved_tensors
        grad = grad.contiguous()
        _, need_values, _, need_atoms, need_bias = ctx.needs_input_grad
        return (
            None,
            backend.sampled(grad, atoms, indices).to(values.dtype) if need_values else None,
            None,
            backend.scatter(values, indices, grad, len(atoms)) if need_atoms else None,
            grad.sum(0) if need_bias else None,
        )


class _Entries(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend: SparseBackend, x, weight, bias, indices, values, scale):
        if values is None:
            values = backend.sampled(x, weight, indices)
            values = values if scale is None else values * _picked(scale, indices)
            values = values if bias is None else values + _picked(bias, indices)
        ctx.backend = backend
        ctx.save_for_backward(x, weight, bias, indices, None if scale is None else values, scale)
        return values

    @staticmethod
    def backward(ctx, grad: Tensor):
        backend, (x, weight, bias, indices, values, scale) = ctx.backend, ctx.saved_tensors
        _, need_x, need_w, need_b, _, _, need_s = ctx.needs_input_grad
        grad = grad.contiguous()
        grad_b = grad_s = None
        if scale is None and need_w and need_b:
            grad_w, grad_b = backend.scatter_and_totals(grad, indices, x, len(weight))
            return None, backend.bag(grad, indices, weight) if need_x else None, grad_w, grad_b, None, None, None
        if need_b:
            grad_b = backend.totals(grad, indices, len(weight))
        if scale is not None:
            factor = _picked(scale, indices)
            if need_s:
                product = (values if bias is None else values - _picked(bias, indices)) / factor
                grad_s = backend.totals(grad * product, indices, len(weight))
            grad = grad * factor
        return (
            None,
            backend.bag(grad, indices, weight) if need_x else None,
            backend.scatter(grad, indices, x, len(weight)) if need_w else None,
            grad_b,
            None,
            None,
            grad_s,
        )


class _Sums(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend: SparseBackend, values: Tensor, indices: Tensor, x: Tensor, n_rows: int) -> Tensor:
        ctx.backend = backend
        ctx.save_for_backward(values, indices, x)
        return backend.scatter(values, indices, x, n_rows)

    @staticmethod
    def backward(ctx, grad: Tensor):
        backend, (values, indices, x) = ctx.backend, ctx.saved_tensors
        grad = grad.contiguous()
        _, need_values, _, need_x, _ = ctx.needs_input_grad
        return (
            None,
            backend.sampled(x, grad, indices).to(values.dtype) if need_values else None,
            None,
            backend.bag(values, indices, grad) if need_x else None,
            None,
        )


class _Product(torch.autograd.Function):
    """A dense product whose gradients are products of the same precision."""

    @staticmethod
    def forward(ctx, backend: SparseBackend, x: Tensor, weight: Tensor, precision: str) -> Tensor:
        ctx.backend, ctx.precision, ctx.dtype = backend, precision, x.dtype
        if precision == "bf16":  # rounded once, and not again for each of the gradients
            x, weight = x.bfloat16(), weight.bfloat16()
        ctx.save_for_backward(x, weight)
        return backend.product(x, weight, None, precision).to(ctx.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (x, weight), of = ctx.saved_tensors, ctx.needs_input_grad
        grad = grad.bfloat16() if ctx.precision == "bf16" else grad

        def product(a: Tensor, b: Tensor) -> Tensor:
            return ctx.backend.product(a, b, None, ctx.precision).to(ctx.dtype)

        return (
            None,
            product(grad, weight.t()) if of[1] else None,
            product(grad.t(), x.t()) if of[2] else None,
            None,
        )
