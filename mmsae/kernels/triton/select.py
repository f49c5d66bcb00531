"""Choice of entries of a dense (N, F) product: exact top-k of rows, largest of groups, what is above a threshold.

The k-th largest of a set of keys is found bit by bit, from the highest: each round counts those that reach the
candidate. Top-k reads the matrix once, for the maxima of groups of columns, and then the k groups that matter.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmsae.kernels.triton.keys import GROUP, KEY_BITS, LEAST, key_of, maxima, score_of
from mmsae.kernels.triton.launch import cdiv, in_rows, launch, next_power_of_2, warps
from mmsae.kernels.triton.threshold import above, batch_threshold, count_above

__all__ = ["above", "batch_threshold", "count_above", "group_max", "topk"]


@triton.jit
def _taken(keys, k, BITS: tl.constexpr):
    """The k largest keys, equal ones in their order: which they are, and the place of each among them."""
    reached = tl.full((), LEAST, tl.int32)
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
    PLACES: tl.constexpr,
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
        taken, place = _taken(tl.where(g < n_groups, key_of(maxima), LEAST), k, BITS)
        # the ids are packed by way of memory, where the indices will be; the barrier makes them visible
        tl.store(indices_ptr + row * k + place, g.to(tl.int64), mask=taken)
        tl.debug_barrier()
        used = slot < k
        group = tl.load(indices_ptr + row * k + slot, mask=used, other=0).to(tl.int32)
        tl.debug_barrier()
    column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    valid = used[:, None] & (column < n_cols)
    x = tl.load(matrix_ptr + row * stride + column, mask=valid, other=0)
    keys = tl.where(valid, key_of(score_of(x, factor_ptr, column, valid, ABSOLUTE)), LEAST)
    taken, to = _taken(tl.reshape(keys, [SLOTS * GROUP]), k, BITS)
    to = indices_ptr + row * k + tl.reshape(to, [SLOTS, GROUP])
    tl.store(to, column.to(tl.int64), mask=tl.reshape(taken, [SLOTS, GROUP]))
    # entries are read again for the few that are taken, instead of being held in registers all the while
    tl.debug_barrier()
    place = tl.arange(0, PLACES)
    chosen = tl.load(indices_ptr + row * k + place, mask=place < k, other=0)
    entry = tl.load(matrix_ptr + row * stride + chosen, mask=place < k, other=0)
    tl.store(values_ptr + row * k + place, entry, mask=place < k)


def _plan(f: int, k: int) -> int | None:
    """Size of the groups for top-k of F columns; 0: rows are taken whole; None: too large for one program."""
    group = GROUP
    while group > 8 and k * group > 4096:  # 8 float32 numbers are a sector, the least that memory gives
        group //= 2
    while cdiv(f, group) > 2**15:
        group *= 2
    if 2 * k * group <= f and k * group <= 2**15:
        return group
    return 0 if f <= 2**15 else None


@lru_cache(256)  # a launch has no time for arithmetic
def _sizes(f: int, k: int, bits: int) -> tuple[int | None, int, dict[str, Any]]:
    """:func:`_plan`, the number of groups, and the sizes of a program."""
    group = _plan(f, k)
    size, slots = (group, k) if group else (min(GROUP, next_power_of_2(f)), cdiv(f, GROUP))
    n_groups, slots = cdiv(f, size), next_power_of_2(slots)
    sizes = dict(
        BITS=bits,
        GROUP=size,
        GROUPS=next_power_of_2(n_groups) if group else 1,
        SLOTS=slots,
        PLACES=next_power_of_2(k),
        # 16 keys a thread take 65 to 90 registers (ptxas, sm_90), 32 take up to 200: rows mostly wait for their counts,
        # so more of them at once are worth more than fewer barriers
        num_warps=warps(max(slots * size, n_groups if group else 1), 16),
    )
    return group, n_groups, sizes


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
    factor = None if factor is None else factor.contiguous()
    values, indices = matrix.new_empty(n, k), matrix.new_empty(n, k, dtype=torch.long)
    if not values.numel():
        return values, indices
    group, n_groups, sizes = _sizes(f, k, KEY_BITS[torch.float32 if factor is not None else matrix.dtype])
    if group is None:
        score = matrix if factor is None else matrix.float() * factor.float()
        order = (score.abs() if absolute else score).sort(dim=1, descending=True, stable=True).indices
        indices = order[:, :k].sort(dim=1).values
        return matrix.gather(1, indices), indices
    best = maxima(matrix, absolute, factor, group) if group else None
    launch(
        _topk_kernel,
        (n,),
        matrix,
        factor,
        best,
        values,
        indices,
        f,
        n_groups,
        matrix.stride(0),
        k,
        ABSOLUTE=absolute,
        **sizes,
    )
    return values, indices


@triton.jit
def _group_max_kernel(
    matrix_ptr,
    values_ptr,
    indices_ptr,
    groups,
    size,
    stride,
    n_blocks,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The largest entry of GROUPS groups of a row, BLOCK columns of each at a time; the first of equal ones."""
    row = (tl.program_id(0) // n_blocks).to(tl.int64)
    group = (tl.program_id(0) % n_blocks) * GROUPS + tl.arange(0, GROUPS)
    best = tl.full([GROUPS], -float("inf"), tl.float32)
    place = tl.zeros([GROUPS], tl.int32)
    for start in range(0, size, BLOCK):
        offset = start + tl.arange(0, BLOCK)
        valid = (group < groups)[:, None] & (offset < size)[None, :]
        at = matrix_ptr + row * stride + group[:, None] * size + offset[None, :]
        x = tl.load(at, mask=valid, other=-float("inf")).to(tl.float32)
        largest = tl.max(x, 1)
        first = tl.min(tl.where(x == largest[:, None], offset[None, :], start + BLOCK), 1)
        place = tl.where(largest > best, first, place)
        best = tl.maximum(best, largest)
    at = row * groups + group
    tl.store(values_ptr + at, best, mask=group < groups)
    tl.store(indices_ptr + at, (group * size + place).to(tl.int64), mask=group < groups)


@torch.no_grad()
def group_max(matrix: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """The largest entry of each of ``groups`` equal parts of the columns of ``matrix (N, F)``; of equal ones the first.

    Returns:
        ``(values, indices)``, both ``(N, groups)``: entries, and int64 columns.

    Raises:
        ValueError: ``groups`` does not divide F.
    """
    n, f = matrix.shape
    if groups < 1 or f % groups or not f:
        raise ValueError(f"{f} columns are not {groups} groups of equal size")
    matrix, size = in_rows(matrix), f // groups
    values, indices = matrix.new_empty(n, groups), matrix.new_empty(n, groups, dtype=torch.long)
    # 4,096 entries a program, as in pass A
    block = min(next_power_of_2(size), 1024)
    tile = min(next_power_of_2(groups), 4096 // block)
    n_blocks = cdiv(groups, tile)
    launch(
        _group_max_kernel,
        (n * n_blocks,),
        matrix,
        values,
        indices,
        groups,
        size,
        matrix.stride(0),
        n_blocks,
        GROUPS=tile,
        BLOCK=block,
        num_warps=warps(block * tile, 32, 4),
    )
    return values, indices
