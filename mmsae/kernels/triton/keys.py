"""Entries of a matrix as integers in their order, and the maxima of groups of columns: what every choice begins with.

The bits of a float32 number, with the sign turned into that of an integer, have the order of the numbers (-0 and 0 are
one integer). Entries of half types are widened to float32, which leaves the low bits of the key 0, so that a search
bit by bit takes 16 rounds for bfloat16, 19 for float16 and 32 for float32. NaN has no place in this order.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmsae.kernels.triton.launch import cdiv, in_rows, launch, next_power_of_2, warps

#: High bits of a float32 key that entries of a type can set: sign, exponent, mantissa (float16: mantissa of 10 bits).
KEY_BITS = {torch.bfloat16: 16, torch.float16: 19, torch.float32: 32}
LEAST = tl.constexpr(-(2**31))  #: Below every key.
GROUP = 32  #: Neighbouring columns whose maximum stands for them in the first pass.


@triton.jit
def key_of(x):
    """Integers in the order of the float32 numbers; the smallest int32 is below all of them."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


@triton.jit
def score_of(x, factor_ptr, column, valid, ABSOLUTE: tl.constexpr):
    """What is ranked of entries at ``column``, in float32."""
    score = x.to(tl.float32)
    if factor_ptr is not None:
        score *= tl.load(factor_ptr + column, mask=valid, other=0).to(tl.float32)
    if ABSOLUTE:
        score = tl.abs(score)
    return score


@triton.jit
def _maxima_kernel(
    matrix_ptr,
    factor_ptr,
    maxima_ptr,
    n_cols,
    n_groups,
    n_blocks,
    stride,
    ABSOLUTE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Pass A: the largest score of each group of neighbouring columns; one program for BLOCK groups of a row."""
    row = (tl.program_id(0) // n_blocks).to(tl.int64)
    group = (tl.program_id(0) % n_blocks) * BLOCK + tl.arange(0, BLOCK)
    column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    valid = column < n_cols
    x = tl.load(matrix_ptr + row * stride + column, mask=valid, other=0)
    score = tl.where(valid, score_of(x, factor_ptr, column, valid, ABSOLUTE), -float("inf"))
    tl.store(maxima_ptr + row * n_groups + group, tl.max(score, 1), mask=group < n_groups)


@lru_cache(256)  # a launch has no time for arithmetic
def _tiles(f: int, group: int) -> tuple[int, int, dict[str, Any]]:
    """Groups of F columns, programs a row, and the sizes of one."""
    n_groups = cdiv(f, group)
    # 4,096 entries a program: 8 kB and more of neighbouring memory, with four and more loads of 16 bytes of each thread
    # under way; a row's end wastes less than one program
    block = min(max(1, 4096 // group), next_power_of_2(n_groups))
    return n_groups, cdiv(n_groups, block), dict(GROUP=group, BLOCK=block, num_warps=warps(block * group, 32, 4))


def maxima(matrix: Tensor, absolute: bool = False, factor: Tensor | None = None, group: int = GROUP) -> Tensor:
    """``(N, ceil(F / group))`` largest scores of neighbouring columns of ``matrix (N, F)``: pass A of a top-k.

    Scores are in the type of the matrix or, with factors, in float32.
    """
    matrix = in_rows(matrix)
    n, f = matrix.shape
    n_groups, n_blocks, sizes = _tiles(f, group)
    out = matrix.new_empty(n, n_groups, dtype=matrix.dtype if factor is None else torch.float32)
    launch(
        _maxima_kernel,
        (n * n_blocks,),
        matrix,
        factor,
        out,
        f,
        n_groups,
        n_blocks,
        matrix.stride(0),
        ABSOLUTE=absolute,
        **sizes,
    )
    return out
