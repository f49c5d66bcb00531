"""Cosines of pairs of sparse codes and their gradients, one program a pair: every entry meets all of the partner's.

That is ``ka * kb`` comparisons, which a program has in registers, where sorting the ids of every row takes a dozen
operations of torch, each of them passes over the codes, and twice as many for the gradients.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmsae.kernels.triton.launch import launch, next_power_of_2, warps

MOST = 512  #: Entries a row up to which it is worth while: comparisons grow with their square.


@triton.jit
def _squares(values_ptr, first, k, BLOCK: tl.constexpr):
    """The sum of the squares of a row's values."""
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, k, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        value = tl.load(values_ptr + first + slot, mask=slot < k, other=0).to(tl.float32)
        total += value * value
    return tl.sum(total, 0)


@triton.jit
def _cosine_kernel(a_ptr, ids_a_ptr, b_ptr, ids_b_ptr, out_ptr, ka, kb, eps, SLOTS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, SLOTS)
    a = tl.load(a_ptr + row * ka + slot, mask=slot < ka, other=0).to(tl.float32)
    ids_a = tl.load(ids_a_ptr + row * ka + slot, mask=slot < ka, other=-1)
    read = tl.zeros([SLOTS], tl.float32)  # the partner's values at the ids of a
    for start in range(0, kb, BLOCK):
        other = start + tl.arange(0, BLOCK)
        b = tl.load(b_ptr + row * kb + other, mask=other < kb, other=0).to(tl.float32)
        ids_b = tl.load(ids_b_ptr + row * kb + other, mask=other < kb, other=-2)
        read += tl.sum(tl.where(ids_a[:, None] == ids_b[None, :], b[None, :], 0.0), 1)
    norms = tl.sqrt_rn(tl.sum(a * a, 0)) * tl.sqrt_rn(_squares(b_ptr, row * kb, kb, BLOCK))
    tl.store(out_ptr + row, tl.div_rn(tl.sum(a * read, 0), tl.maximum(norms, eps)))


@triton.jit
def _cosine_gradient_kernel(
    a_ptr,
    ids_a_ptr,
    b_ptr,
    ids_b_ptr,
    cosine_ptr,
    up_ptr,
    grad_a_ptr,
    grad_b_ptr,
    ka,
    kb,
    up_stride,
    eps,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``up * (partner / norms - cosine * own / own norm^2)``; where the norms are below eps, which stands for them, the
    first term alone.
    """
    row = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, SLOTS)
    a = tl.load(a_ptr + row * ka + slot, mask=slot < ka, other=0).to(tl.float32)
    ids_a = tl.load(ids_a_ptr + row * ka + slot, mask=slot < ka, other=-1)
    squares_a, squares_b = tl.sum(a * a, 0), _squares(b_ptr, row * kb, kb, BLOCK)
    norms = tl.sqrt_rn(squares_a) * tl.sqrt_rn(squares_b)
    up = tl.load(up_ptr + row * up_stride).to(tl.float32)
    by = tl.div_rn(up, tl.maximum(norms, eps))
    along = tl.where(norms >= eps, up * tl.load(cosine_ptr + row), 0.0)
    along_a = tl.div_rn(along, tl.where(squares_a > 0, squares_a, 1.0))
    along_b = tl.div_rn(along, tl.where(squares_b > 0, squares_b, 1.0))
    read = tl.zeros([SLOTS], tl.float32)
    for start in range(0, kb, BLOCK):
        other = start + tl.arange(0, BLOCK)
        b = tl.load(b_ptr + row * kb + other, mask=other < kb, other=0).to(tl.float32)
        ids_b = tl.load(ids_b_ptr + row * kb + other, mask=other < kb, other=-2)
        same = ids_a[:, None] == ids_b[None, :]
        read += tl.sum(tl.where(same, b[None, :], 0.0), 1)
        back = tl.sum(tl.where(same, a[:, None], 0.0), 0)
        tl.store(grad_b_ptr + row * kb + other, by * back - along_b * b, mask=other < kb)
    tl.store(grad_a_ptr + row * ka + slot, by * read - along_a * a, mask=slot < ka)


@lru_cache(256)  # a launch has no time for arithmetic
def _sizes(ka: int, kb: int) -> dict[str, Any]:
    slots = next_power_of_2(max(ka, 1))
    # 2,048 comparisons at a time at most, 16 for a thread
    block = min(next_power_of_2(max(kb, 1)), max(1, 2048 // slots))
    return dict(SLOTS=slots, BLOCK=block, num_warps=warps(slots * block, 16, 8))


def cosine(a: Tensor, ids_a: Tensor, b: Tensor, ids_b: Tensor, eps: float) -> Tensor:
    """``(N,)`` float32 cosines of row i of a code with row i of another, on a norm of ``eps`` at least.

    Args:
        a: ``(N, ka)`` values.
        ids_a: ``(N, ka)`` int64 ids that differ within a row.
        b: ``(N, kb)`` values.
        ids_b: ``(N, kb)`` their ids.
        eps: What the product of two norms is at least.
    """
    (n, ka), kb = a.shape, b.shape[1]
    out = a.new_empty(n, dtype=torch.float32)
    if n:
        launch(_cosine_kernel, (n,), a, ids_a, b, ids_b, out, ka, kb, eps, **_sizes(ka, kb))
    return out


def cosine_gradients(
    a: Tensor, ids_a: Tensor, b: Tensor, ids_b: Tensor, cosines: Tensor, up: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradients of the values of both codes, from those of ``cosines (N,)``; arguments as of :func:`cosine`.

    ``up (N,)`` may be one number for all rows (of stride 0), as the gradient of a mean is.
    """
    (n, ka), kb = a.shape, b.shape[1]
    grad_a, grad_b = torch.empty_like(a), torch.empty_like(b)
    if n:
        launch(
            _cosine_gradient_kernel,
            (n,),
            a,
            ids_a,
            b,
            ids_b,
            cosines,
            up,
            grad_a,
            grad_b,
            ka,
            kb,
            up.stride(0),
            eps,
            **_sizes(ka, kb),
        )
    return grad_a, grad_b
