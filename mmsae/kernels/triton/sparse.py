"""Products of a k-sparse code with a dictionary, of which each is a gradient of another; sums are float32.

``bag``, ``sampled`` and ``scatter`` are those of :mod:`mmsae.kernels.sparse`. Values are ``(N, k)``, indices int64 and
without repetition in a row, tables ``(F, d)`` and inputs ``(N, d)`` of float32, bfloat16 or float16, d of any size.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmsae.kernels.triton.launch import cdiv, in_rows, launch, next_power_of_2, warps

#: Neighbouring entries that are summed up by themselves where all are one latent's; no program takes twice as many.
WINDOW = 128


def _block(d: int) -> int:
    """Columns of a program: a row where it has up to 1,024, which are 8 for each thread of 4 warps."""
    return min(next_power_of_2(d), 1024)


@triton.jit
def _bag_kernel(
    values_ptr, indices_ptr, table_ptr, bias_ptr, out_ptr, k, d, table_stride, SLOTS: tl.constexpr, BLOCK: tl.constexpr
):
    """The sum of atoms of one row, and of the bias."""
    row = tl.program_id(0).to(tl.int64)
    for first in range(0, d, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = column < d
        out = tl.zeros([BLOCK], tl.float32)
        # SLOTS atoms at a time: their loads do not wait for each other
        for start in range(0, k, SLOTS):
            slot = start + tl.arange(0, SLOTS)
            used = slot < k
            value = tl.load(values_ptr + row * k + slot, mask=used, other=0).to(tl.float32)
            atom = tl.load(indices_ptr + row * k + slot, mask=used, other=0).to(tl.int64)
            at = table_ptr + atom[:, None] * table_stride + column[None, :]
            rows = tl.load(at, mask=used[:, None] & inside[None, :], other=0).to(tl.float32)
            out += tl.sum(value[:, None] * rows, 0)
        if bias_ptr is not None:
            out += tl.load(bias_ptr + column, mask=inside, other=0).to(tl.float32)
        tl.store(out_ptr + row * d + column, out, mask=inside)


@lru_cache(256)  # a launch has no time for arithmetic
def _bag_sizes(k: int, d: int) -> dict[str, Any]:
    block = _block(d)
    return dict(SLOTS=min(8, next_power_of_2(max(k, 1))), BLOCK=block, num_warps=warps(block, 8))


def bag(values: Tensor, indices: Tensor, table: Tensor, bias: Tensor | None = None) -> Tensor:
    """``(N, d)`` float32 sums of rows of ``table (F, d)``: ``out[n] = sum_j values[n, j] * table[indices[n, j]]``.

    ``bias (d,)`` is added to each.
    """
    (n, k), d = values.shape, table.shape[1]
    table = in_rows(table)
    out = values.new_empty(n, d, dtype=torch.float32)
    if n and d:
        launch(
            _bag_kernel,
            (n,),
            values.contiguous(),
            indices.contiguous(),
            table,
            None if bias is None else bias.contiguous(),
            out,
            k,
            d,
            table.stride(0),
            **_bag_sizes(k, d),
        )
    return out


@triton.jit
def _sampled_kernel(
    x_ptr,
    table_ptr,
    indices_ptr,
    out_ptr,
    k,
    d,
    n_blocks,
    x_stride,
    table_stride,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Dot products of a row with SLOTS of its atoms: BLOCK columns at a time, added up across threads at the end."""
    row = (tl.program_id(0) // n_blocks).to(tl.int64)
    slot = (tl.program_id(0) % n_blocks) * SLOTS + tl.arange(0, SLOTS)
    used = slot < k
    atom = tl.load(indices_ptr + row * k + slot, mask=used, other=0).to(tl.int64)
    products = tl.zeros([SLOTS, BLOCK], tl.float32)
    for first in range(0, d, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = column < d
        x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0).to(tl.float32)
        at = table_ptr + atom[:, None] * table_stride + column[None, :]
        products += tl.load(at, mask=used[:, None] & inside[None, :], other=0).to(tl.float32) * x[None, :]
    tl.store(out_ptr + row * k + slot, tl.sum(products, 1), mask=used)


@lru_cache(256)
def _sampled_sizes(k: int, d: int, bytes_each: int) -> tuple[int, dict[str, Any]]:
    """Programs a row, and the sizes of one."""
    # one warp, whose 32 threads of 16 bytes each are a block of columns: nothing goes through shared memory, neither x
    # to the layout of the atoms nor the sums
    block = min(next_power_of_2(max(d, 1)), 512 // bytes_each)
    slots = min(1024 // block, next_power_of_2(k))
    return cdiv(k, slots), dict(SLOTS=slots, BLOCK=block, num_warps=1)


def sampled(x: Tensor, table: Tensor, indices: Tensor) -> Tensor:
    """``(N, k)`` float32 products of rows of ``x (N, d)`` with rows of ``table (F, d)`` at ``indices (N, k)``."""
    (n, k), d = indices.shape, table.shape[1]
    x, table = in_rows(x), in_rows(table)
    out = x.new_empty(n, k, dtype=torch.float32)
    if not out.numel():
        return out
    n_blocks, sizes = _sampled_sizes(k, d, table.element_size())
    launch(
        _sampled_kernel,
        (n * n_blocks,),
        x,
        table,
        indices.contiguous(),
        out,
        k,
        d,
        n_blocks,
        x.stride(0),
        table.stride(0),
        **sizes,
    )
    return out


class Segments(NamedTuple):
    """Entries of a code by latent."""

    order: Tensor  #: ``(N * k,)`` int64: places of the flat code, by latent, within a latent by row.
    starts: Tensor  #: ``(n_rows + 1,)`` int32: where in ``order`` the entries of each latent begin, and the end.


@torch.no_grad()
def segments(indices: Tensor, n_rows: int) -> Segments:
    """Sort the entries of a code by latent, for every sum by latent of that code.

    Args:
        indices: ``(N, k)``, below ``n_rows``.
        n_rows: Number of latents.

    Raises:
        ValueError: There are 2^31 entries or more.
    """
    if indices.numel() >= 2**31:
        raise ValueError(f"a code of {indices.numel()} entries is too large to be sorted by latent (2^31)")
    latents, order = indices.reshape(-1).to(torch.int32).sort(stable=True)
    # not bincount, which waits for the device to learn the largest id
    ids = torch.arange(n_rows + 1, dtype=torch.int32, device=indices.device)
    return Segments(order, torch.searchsorted(latents, ids, out_int32=True))


@triton.jit
def _entries(
    first,
    before,
    skip,
    n,
    order_ptr,
    values_ptr,
    x_ptr,
    x_stride,
    column,
    k,
    d,
    ENTRIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sum over n entries of the order from ``first`` on, of which the first ``before`` lie before a gap."""
    out = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n, ENTRIES):
        i = start + tl.arange(0, ENTRIES)
        used = i < n
        entry = tl.load(order_ptr + first + i + tl.where(i < before, 0, skip), mask=used, other=0).to(tl.int32)
        row = (entry // k).to(tl.int64)
        value = tl.load(values_ptr + entry, mask=used, other=0).to(tl.float32)
        at = x_ptr + row[:, None] * x_stride + column[None, :]
        x = tl.load(at, mask=used[:, None] & (column < d)[None, :], other=0).to(tl.float32)
        out += tl.sum(value[:, None] * x, 0)
    return out


@triton.jit
def _total(first, before, skip, n, order_ptr, values_ptr, MANY: tl.constexpr):
    """The sum of the values of these entries, in a loop of its own: in that of the rows it would take 35 registers."""
    total = tl.zeros([MANY], tl.float32)
    for start in range(0, n, MANY):
        i = start + tl.arange(0, MANY)
        entry = tl.load(order_ptr + first + i + tl.where(i < before, 0, skip), mask=i < n, other=0)
        total += tl.load(values_ptr + entry, mask=i < n, other=0).to(tl.float32)
    return tl.sum(total, 0)


@triton.jit
def _window_kernel(
    indices_ptr,
    order_ptr,
    starts_ptr,
    values_ptr,
    x_ptr,
    x_stride,
    sums_ptr,
    window_totals_ptr,
    k,
    d,
    WINDOW: tl.constexpr,
    ENTRIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sum over the WINDOW entries from a multiple of WINDOW on, if they are of one latent; nothing otherwise."""
    window = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first = window * WINDOW
    latent = tl.load(indices_ptr + tl.load(order_ptr + first))
    if tl.load(starts_ptr + latent + 1) >= first + WINDOW:
        out = _entries(
            first, WINDOW, 0, WINDOW, order_ptr, values_ptr, x_ptr, x_stride, column, k, d, ENTRIES, BLOCK
        )  # fmt: skip
        tl.store(sums_ptr + window.to(tl.int64) * d + column, out, mask=column < d)
        if window_totals_ptr is not None:
            total = _total(first, WINDOW, 0, WINDOW, order_ptr, values_ptr, WINDOW)
            tl.store(window_totals_ptr + window, total, mask=tl.program_id(1) == 0)


@triton.jit
def _scatter_kernel(
    order_ptr,
    starts_ptr,
    values_ptr,
    x_ptr,
    x_stride,
    sums_ptr,
    window_totals_ptr,
    out_ptr,
    totals_ptr,
    k,
    d,
    WINDOW: tl.constexpr,
    ENTRIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sum of one latent: over its entries that lie in no whole window, then over the sums of its windows."""
    latent = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first, last = tl.load(starts_ptr + latent), tl.load(starts_ptr + latent + 1)
    window, end = (first + WINDOW - 1) // WINDOW, last // WINDOW
    skip = tl.maximum(end - window, 0) * WINDOW
    out = _entries(
        first, window * WINDOW - first, skip, last - first - skip, order_ptr, values_ptr, x_ptr, x_stride,
        column, k, d, ENTRIES, BLOCK,
    )  # fmt: skip
    for start in range(window, end, ENTRIES):
        row = start + tl.arange(0, ENTRIES)
        at = sums_ptr + row[:, None].to(tl.int64) * d + column[None, :]
        out += tl.sum(tl.load(at, mask=(row < end)[:, None] & (column < d)[None, :], other=0), 0)
    tl.store(out_ptr + latent.to(tl.int64) * d + column, out, mask=column < d)
    if totals_ptr is not None:
        total = _total(first, window * WINDOW - first, skip, last - first - skip, order_ptr, values_ptr, WINDOW)
        for start in range(window, end, WINDOW):
            row = start + tl.arange(0, WINDOW)
            total += tl.sum(tl.load(window_totals_ptr + row, mask=row < end, other=0), 0)
        tl.store(totals_ptr + latent, total, mask=tl.program_id(1) == 0)


@lru_cache(256)
def _scatter_sizes(d: int) -> dict[str, Any]:
    block = _block(d)
    # rows of 8 entries under way at a time, of which a thread has 8 columns each: 64 registers
    return dict(WINDOW=WINDOW, ENTRIES=8, BLOCK=block, num_warps=warps(block, 8))


def scatter(
    values: Tensor,
    indices: Tensor,
    x: Tensor,
    n_rows: int,
    by_latent: Segments | None = None,
    totals: Tensor | None = None,
) -> Tensor:
    """``(n_rows, d)`` float32: for each latent the sum of ``x (N, d)`` weighted by its values.

    Segments longer than a window are split, so that a latent of every row takes no longer than others. The order of
    each sum is that of the rows within a window, so results are the same on every run.

    Args:
        values: ``(N, k)``.
        indices: ``(N, k)``, below ``n_rows``.
        x: ``(N, d)``.
        n_rows: Number of latents.
        by_latent: The :func:`segments` of these indices, where they are known.
        totals: ``(n_rows,)`` float32, into which each latent's sum of values is written, where it is wanted too.

    Raises:
        ValueError: The inputs are not as many as the codes.
    """
    (n, k), d = indices.shape, x.shape[1]
    if len(x) != n:
        raise ValueError(f"inputs must be ({n}, {d}), not {tuple(x.shape)}")
    if not (n * k * d * n_rows):
        if totals is not None:
            totals.zero_()
        return x.new_zeros(n_rows, d, dtype=torch.float32)
    order, starts = segments(indices, n_rows) if by_latent is None else by_latent
    sizes, n_windows, x = _scatter_sizes(d), n * k // WINDOW, in_rows(x)
    blocks = cdiv(d, sizes["BLOCK"])
    out = x.new_empty(n_rows, d, dtype=torch.float32)
    # sums of windows, and behind them their totals
    sums = x.new_empty(n_windows * (d + 1), dtype=torch.float32)
    operands = (values.contiguous(), x, x.stride(0), sums, None if totals is None else sums[n_windows * d :])
    if n_windows:
        grid = (n_windows, blocks)
        launch(_window_kernel, grid, indices.contiguous(), order, starts, *operands, k, d, **sizes)
    launch(_scatter_kernel, (n_rows, blocks), order, starts, *operands, out, totals, k, d, **sizes)
    return out
