"""Choice of entries of a dense (N, F) product: exact top-k of rows, thresholds of a batch, and what is above one.

Entries are compared as integers: the bits of a float32 number, with the sign turned into that of an integer, have the
order of the numbers (-0 and 0 are one integer). The k-th largest of a set is then found bit by bit, from the highest:
each round counts the keys that reach the candidate. Entries of half types are widened to float32, which leaves the low
bits of the key 0, so that bfloat16 takes 16 rounds, float16 19 and float32 32. NaN has no place in this order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmsae.kernels.triton.launch import in_rows, warps

#: High bits of a float32 key that entries of a type can set: sign, exponent, mantissa (float16: mantissa of 10 bits).
KEY_BITS = {torch.bfloat16: 16, torch.float16: 19, torch.float32: 32}
GROUP = 32  #: Neighbouring columns whose maximum stands for them in the first pass.


@triton.jit
def _key(x):
    """Integers in the order of the float32 numbers; the smallest int32 is below all of them."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


@triton.jit
def _score(x, factor_ptr, column, valid, ABSOLUTE: tl.constexpr):
    """What is ranked of entries at ``column``, in float32."""
    score = x.to(tl.float32)
    if factor_ptr is not None:
        score *= tl.load(factor_ptr + column, mask=valid, other=0).to(tl.float32)
    if ABSOLUTE:
        score = tl.abs(score)
    return score


@triton.jit
def _taken(keys, k, BITS: tl.constexpr):
    """The k largest keys, equal ones in their order: which they are, and the place of each among them."""
    reached = tl.full((), -2147483648, tl.int32)
    bit = reached
    for _ in range(BITS):
        candidate = reached ^ bit
        count = tl.sum((keys >= candidate).to(tl.int32), 0)
        reached = tl.where(count >= k, candidate, reached)
        bit = (bit >> 1) & 0x7FFFFFFF  # a logical shift
    above = (keys > reached).to(tl.int32)
    equal = (keys == reached).to(tl.int32)
    room = k - tl.sum(above, 0)
    # both running counts in one scan, 16 bits each: there are at most 2^15 keys, and fewer than that above
    count = tl.cumsum((above << 16) | equal, 0)
    n_above, n_equal = count >> 16, count & 0xFFFF
    taken = (above != 0) | ((equal != 0) & (n_equal <= room))
    return taken, n_above + tl.minimum(n_equal, room) - 1


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
    score = tl.where(valid, _score(x, factor_ptr, column, valid, ABSOLUTE), -float("inf"))
    tl.store(maxima_ptr + row * n_groups + group, tl.max(score, 1), mask=group < n_groups)


@triton.jit
def _topk_kernel(
    matrix_ptr,
    factor_ptr,
    maxima_ptr,
    values_ptr,
    indices_ptr,
    n_cols,
    n_groups,
    stride,
    k,
    BITS: tl.constexpr,
    ABSOLUTE: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Pass B: top-k of a row among the entries of k groups; of all SLOTS groups where there are no maxima.

    Let t be the k-th largest maximum. The groups above t, and the first of those at t that make k of them, hold at
    least k entries of t or more, and every entry above t. If the k-th largest entry is t itself, they also hold the
    first of the entries equal to it in the order of columns, as many as are needed: each group at t has one.
    """
    row = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, SLOTS)
    if maxima_ptr is None:
        group = slot
        used = slot < n_groups
    else:
        g = tl.arange(0, GROUPS)
        maxima = tl.load(maxima_ptr + row * n_groups + g, mask=g < n_groups, other=0).to(tl.float32)
        taken, place = _taken(tl.where(g < n_groups, _key(maxima), -2147483648), k, BITS)
        # the ids are packed by way of memory, where the indices will be; the barrier makes them visible
        tl.store(indices_ptr + row * k + place, g.to(tl.int64), mask=taken)
        tl.debug_barrier()
        used = slot < k
        group = tl.load(indices_ptr + row * k + slot, mask=used, other=0).to(tl.int32)
        tl.debug_barrier()
    column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    valid = used[:, None] & (column < n_cols)
    x = tl.load(matrix_ptr + row * stride + column, mask=valid, other=0)
    keys = tl.where(valid, _key(_score(x, factor_ptr, column, valid, ABSOLUTE)), -2147483648)
    taken, place = _taken(tl.reshape(keys, [SLOTS * GROUP]), k, BITS)
    tl.store(values_ptr + row * k + place, tl.reshape(x, [SLOTS * GROUP]), mask=taken)
    tl.store(indices_ptr + row * k + place, tl.reshape(column, [SLOTS * GROUP]).to(tl.int64), mask=taken)


def maxima(matrix: Tensor, absolute: bool = False, factor: Tensor | None = None, group: int = GROUP) -> Tensor:
    """``(N, ceil(F / group))`` largest scores of neighbouring columns of ``matrix (N, F)``: pass A of :func:`topk`.

    Scores are as there, in the type of the matrix or, with factors, in float32.
    """
    matrix = in_rows(matrix)
    (n, f), n_groups = matrix.shape, triton.cdiv(matrix.shape[1], group)
    out = matrix.new_empty(n, n_groups, dtype=matrix.dtype if factor is None else torch.float32)
    # 4,096 entries a program: 8 kB and more of neighbouring memory, with four and more loads of 16 bytes of each thread
    # under way; a row's end wastes less than one program
    block = min(max(1, 4096 // group), triton.next_power_of_2(n_groups))
    n_blocks = triton.cdiv(n_groups, block)
    with torch.cuda.device_of(matrix):
        _maxima_kernel[(n * n_blocks,)](
            matrix,
            factor,
            out,
            f,
            n_groups,
            n_blocks,
            matrix.stride(0),
            ABSOLUTE=absolute,
            GROUP=group,
            BLOCK=block,
            num_warps=warps(block * group, 32, 4),
        )
    return out


def _plan(f: int, k: int) -> int | None:
    """Size of the groups for top-k of F columns; 0: rows are taken whole; None: too large for one program."""
    group = GROUP
    while group > 8 and k * group > 4096:  # 8: a sector of memory in float32
        group //= 2
    while triton.cdiv(f, group) > 2**15:
        group *= 2
    if 2 * k * group <= f and k * group <= 2**15:
        return group
    return 0 if f <= 2**15 else None


@torch.no_grad()
def topk(matrix: Tensor, k: int, absolute: bool = False, factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The k entries of each row of ``matrix (N, F)`` with the largest scores, in the order of columns.

    The score is the entry, or its product with the column's ``factor (F,)`` in float32, or the absolute value of
    either. Of equal scores the first columns win, so that the result is one set; ``torch.topk`` has the same entries
    where no scores are equal.

    Args:
        matrix: float32, bfloat16 or float16, without NaN.
        k: At most F. Rows of which more than 2^15 entries would have to be held at once are sorted by torch.
        absolute: Whether the score is an absolute value.
        factor: Of the columns.

    Returns:
        ``(values, indices)``, both ``(N, k)``: entries of the matrix (not scores), and int64 columns.

    Raises:
        ValueError: k is not from 0 to F, or the type is none of these.
    """
    n, f = matrix.shape
    if not 0 <= k <= f:
        raise ValueError(f"k must be from 0 to the number of columns {f}, not {k}")
    if matrix.dtype not in KEY_BITS:
        raise ValueError(f"top-k takes float32, bfloat16 and float16, not {matrix.dtype}")
    matrix = in_rows(matrix)
    values, indices = matrix.new_empty(n, k), matrix.new_empty(n, k, dtype=torch.long)
    if not values.numel():
        return values, indices
    group = _plan(f, k)
    if group is None:
        score = matrix if factor is None else matrix.float() * factor.float()
        order = (score.abs() if absolute else score).sort(dim=1, descending=True, stable=True).indices
        indices = order[:, :k].sort(dim=1).values
        return matrix.gather(1, indices), indices
    best = maxima(matrix, absolute, factor, group) if group else None
    size, slots = (group, k) if group else (min(GROUP, triton.next_power_of_2(f)), triton.cdiv(f, GROUP))
    n_groups, slots = triton.cdiv(f, size), triton.next_power_of_2(slots)
    with torch.cuda.device_of(matrix):
        _topk_kernel[(n,)](
            matrix,
            factor,
            best,
            values,
            indices,
            f,
            n_groups,
            matrix.stride(0),
            k,
            BITS=32 if factor is not None else KEY_BITS[matrix.dtype],
            ABSOLUTE=absolute,
            GROUP=size,
            GROUPS=triton.next_power_of_2(n_groups) if group else 1,
            SLOTS=slots,
            num_warps=warps(max(slots * size, n_groups if group else 1), 16),
        )
    return values, indices
