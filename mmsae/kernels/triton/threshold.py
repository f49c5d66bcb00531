"""Thresholds of a batch, and the entries of each row that are above one."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmsae.kernels.triton.keys import GROUP, KEY_BITS, key_of, maxima
from mmsae.kernels.triton.launch import cdiv, in_rows, launch, next_power_of_2, warps


@triton.jit
def _descend(counts_ptr, budget, DIGITS: tl.constexpr):
    """The first digits of the key of rank ``budget`` from above, from histograms of digits, and the number of keys.

    Where there are fewer keys it is the last.
    """
    digit = tl.arange(0, 256)
    total = tl.sum(tl.load(counts_ptr + digit), 0)
    rank = tl.minimum(total, budget)
    prefix = tl.full((), 0, tl.int32)
    for i in tl.static_range(DIGITS):
        counts = tl.load(counts_ptr + i * 256 + digit)
        reached = tl.sum(counts, 0) - tl.cumsum(counts, 0) + counts  # keys with this digit or a larger one
        found = tl.sum((reached >= rank).to(tl.int32), 0) - 1
        rank -= tl.sum(tl.where(digit > found, counts, 0), 0)
        prefix = (prefix << 8) | found
    return prefix, total


@triton.jit
def _digit_kernel(
    matrix_ptr,
    maxima_ptr,
    floor_ptr,
    counts_ptr,
    budget,
    n_cols,
    n_groups,
    n_blocks,
    n_tiles,
    stride,
    DIGIT: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Histogram of one digit of the positive keys that agree with the digits found before.

    With maxima, only of those from the floor on, which the histograms of two digits of the maxima give; groups below it
    are not read.
    """
    floor = tl.full((), 1, tl.int32)
    if maxima_ptr is not None:
        prefix, total = _descend(floor_ptr, budget, 2)
        floor = tl.where(total >= budget, tl.maximum(prefix << 16, 1), 1)
    if DIGIT > 0:
        found, _ = _descend(counts_ptr, budget, DIGIT)
    digit = tl.arange(0, 256)
    counts = tl.zeros([256], tl.int32)
    for tile in range(tl.program_id(0), n_tiles, tl.num_programs(0)):
        row = (tile // n_blocks).to(tl.int64)
        group = (tile % n_blocks) * BLOCK + tl.arange(0, BLOCK)
        column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        valid = column < n_cols
        if maxima_ptr is not None:
            best = tl.load(maxima_ptr + row * n_groups + group, mask=group < n_groups, other=0).to(tl.float32)
            valid = valid & (key_of(best) >= floor)[:, None]
        keys = key_of(tl.load(matrix_ptr + row * stride + column, mask=valid, other=0).to(tl.float32))
        counted = keys >= floor
        if DIGIT > 0:
            counted = counted & ((keys >> (32 - 8 * DIGIT)) == found)
        keys = tl.where(counted, (keys >> (24 - 8 * DIGIT)) & 255, 0)
        others = BLOCK * GROUP - tl.sum(tl.sum(counted.to(tl.int32), 1), 0)  # which the histogram counts as 0
        counts += tl.histogram(tl.reshape(keys, [BLOCK * GROUP]), 256) - tl.where(digit == 0, others, 0)
    tl.atomic_add(counts_ptr + DIGIT * 256 + digit, counts.to(tl.int64), mask=counts > 0)


@triton.jit
def _threshold_kernel(counts_ptr, out_ptr, budget, DIGITS: tl.constexpr):
    prefix, total = _descend(counts_ptr, budget, DIGITS)
    threshold = (prefix << (32 - 8 * DIGITS)).to(tl.float32, bitcast=True)
    tl.store(out_ptr, tl.where(total > 0, threshold, float("inf")))


@torch.no_grad()
def batch_threshold(scores: Tensor, budget: int) -> Tensor:
    """The ``budget``-th largest entry of ``scores (N, F)`` if it is positive, else the smallest positive one.

    So ``scores >= threshold`` has ``budget`` entries, more where several are equal to the threshold, fewer where fewer
    are positive. The maxima of groups of columns come first: that of rank ``budget`` is a lower bound of the threshold,
    and what lies below it is not read again. Then the key is found in digits of 8 bits from the highest.

    Args:
        scores: float32, bfloat16 or float16, without NaN.
        budget: At least 1.

    Returns:
        A tensor of no dimensions, of the type of the scores; infinity where no entry is positive.
    """
    if budget < 1:
        raise ValueError(f"a budget must be at least 1, not {budget}")
    out = scores.new_full((), torch.inf)
    if not scores.numel():
        return out
    scores = in_rows(scores)
    best = maxima(scores)
    counts = torch.zeros(2, 4, 256, dtype=torch.long, device=scores.device)
    digits = cdiv(KEY_BITS[scores.dtype], 8)
    for matrix, screen, table in ((best, None, counts[0]), (scores, best, counts[1])):
        n_groups = cdiv(matrix.shape[1], GROUP)
        block = min(4096 // GROUP, next_power_of_2(n_groups))
        n_blocks = cdiv(n_groups, block)
        n_tiles = len(matrix) * n_blocks
        for digit in range(2 if screen is None else digits):
            # programs take many tiles, since each reads the histograms before and adds to its own once
            launch(
                _digit_kernel,
                (min(n_tiles, 1024),),
                matrix,
                screen,
                None if screen is None else counts[0],
                table,
                budget,
                matrix.shape[1],
                n_groups,
                n_blocks,
                n_tiles,
                matrix.stride(0),
                DIGIT=digit,
                GROUP=GROUP,
                BLOCK=block,
                num_warps=4,
            )
    launch(_threshold_kernel, (1,), counts[1], out, budget, DIGITS=digits, num_warps=4)
    return out


@triton.jit
def _on(scores_ptr, threshold_ptr, row, stride, column, n_cols, COLUMNS: tl.constexpr, INCLUSIVE: tl.constexpr):
    """Which entries of a row are above the threshold, of all or of their column."""
    valid = column < n_cols
    score = tl.load(scores_ptr + row * stride + column, mask=valid, other=0).to(tl.float32)
    if COLUMNS:
        threshold = tl.load(threshold_ptr + column, mask=valid, other=0).to(tl.float32)
    else:
        threshold = tl.load(threshold_ptr).to(tl.float32)
    if INCLUSIVE:
        return valid & (score >= threshold)
    else:
        return valid & (score > threshold)


@triton.jit
def _count_kernel(
    scores_ptr,
    threshold_ptr,
    out_ptr,
    n_cols,
    stride,
    COLUMNS: tl.constexpr,
    INCLUSIVE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    count = tl.zeros([BLOCK], tl.int32)
    for start in range(0, n_cols, BLOCK):
        column = start + tl.arange(0, BLOCK)
        count += _on(scores_ptr, threshold_ptr, row, stride, column, n_cols, COLUMNS, INCLUSIVE).to(tl.int32)
    tl.store(out_ptr + row, tl.sum(count, 0))


@triton.jit
def _above_kernel(
    scores_ptr,
    threshold_ptr,
    indices_ptr,
    on_ptr,
    n_cols,
    width,
    stride,
    COLUMNS: tl.constexpr,
    INCLUSIVE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row: the columns above the threshold, then so many others that there are ``width``.

    The others are the first ones, and the first ``width`` columns have enough of them.
    """
    row = tl.program_id(0).to(tl.int64)
    count = tl.full((), 0, tl.int32)
    for start in range(0, n_cols, BLOCK):
        column = start + tl.arange(0, BLOCK)
        on = _on(scores_ptr, threshold_ptr, row, stride, column, n_cols, COLUMNS, INCLUSIVE)
        place = count + tl.cumsum(on.to(tl.int32), 0) - 1
        tl.store(indices_ptr + row * width + place, column.to(tl.int64), mask=on & (place < width))
        count += tl.sum(on.to(tl.int32), 0)
    filled = count
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        on = _on(scores_ptr, threshold_ptr, row, stride, column, n_cols, COLUMNS, INCLUSIVE)
        off = (column < width) & (on == 0)
        place = filled + tl.cumsum(off.to(tl.int32), 0) - 1
        tl.store(indices_ptr + row * width + place, column.to(tl.int64), mask=off & (place < width))
        tl.store(on_ptr + row * width + column, column < count, mask=column < width)
        filled += tl.sum(off.to(tl.int32), 0)


def _above_options(scores: Tensor, threshold: Tensor, inclusive: bool) -> tuple[Tensor, dict[str, int]]:
    if threshold.dim() and threshold.shape != scores.shape[1:]:
        raise ValueError(f"thresholds must be one number or ({scores.shape[1]},), not {tuple(threshold.shape)}")
    block = min(next_power_of_2(max(scores.shape[1], 1)), 2048)
    options = dict(COLUMNS=threshold.dim(), INCLUSIVE=inclusive, BLOCK=block, num_warps=warps(block, 16))
    return in_rows(scores), options


@torch.no_grad()
def count_above(scores: Tensor, threshold: Tensor, inclusive: bool = False) -> Tensor:
    """``(N,)`` int32 numbers of entries of each row of ``scores (N, F)`` above a threshold; see :func:`above`."""
    scores, options = _above_options(scores, threshold, inclusive)
    out = scores.new_empty(len(scores), dtype=torch.int32)
    if len(scores):
        launch(
            _count_kernel,
            (len(scores),),
            scores,
            threshold.contiguous(),
            out,
            scores.shape[1],
            scores.stride(0),
            **options,
        )
    return out


@torch.no_grad()
def above(scores: Tensor, threshold: Tensor, width: int, inclusive: bool = False) -> tuple[Tensor, Tensor]:
    """The columns of each row of ``scores (N, F)`` above a threshold, in their order, and others up to ``width``.

    Args:
        scores: float32, bfloat16 or float16.
        threshold: One number (no dimensions), or ``(F,)``: one for every column.
        width: Columns a row, at most F. A row with more above the threshold keeps its first ``width``.
        inclusive: Whether entries equal to the threshold are above it: they are where it is an entry itself
            (:func:`batch_threshold`), and not where it was learnt.

    Returns:
        ``(indices, on)``, both ``(N, width)``: int64 columns that differ within a row, and which of them are above.

    Raises:
        ValueError: ``width`` is not from 0 to F, or the thresholds do not fit the columns.
    """
    n, f = scores.shape
    if not 0 <= width <= f:
        raise ValueError(f"width must be from 0 to the number of columns {f}, not {width}")
    scores, options = _above_options(scores, threshold, inclusive)
    indices, on = (scores.new_empty(n, width, dtype=t) for t in (torch.long, torch.bool))
    if indices.numel():
        launch(_above_kernel, (n,), scores, threshold.contiguous(), indices, on, f, width, scores.stride(0), **options)
    return indices, on
