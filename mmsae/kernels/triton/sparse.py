"""Products of a k-sparse code with a dictionary, of which each is a gradient of another; sums are float32.

``bag``, ``sampled`` and ``scatter`` are those of :mod:`mmsae.kernels.sparse`. Values are ``(N, k)``, indices int64 and
without repetition in a row, tables ``(F, d)`` and inputs ``(N, d)`` of float32, bfloat16 or float16, d of any size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmsae.kernels.triton.launch import in_rows, launch, warps

#: Neighbouring entries that are summed up by themselves where all are one latent's; no program takes twice as many.
WINDOW = 128


def _block(d: int) -> int:
    """Columns of a program: a row where it has up to 1,024, which are 8 for each thread of 4 warps."""
    return min(triton.next_power_of_2(d), 1024)


@triton.jit
def _bag_kernel(
    values_ptr, indices_ptr, table_ptr, out_ptr, k, d, table_stride, SLOTS: tl.constexpr, BLOCK: tl.constexpr
):
    """The sum of atoms of one row."""
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
        tl.store(out_ptr + row * d + column, out, mask=inside)


@torch.no_grad()
def bag(values: Tensor, indices: Tensor, table: Tensor) -> Tensor:
    """``(N, d)`` float32 sums of rows of ``table (F, d)``: ``out[n] = sum_j values[n, j] * table[indices[n, j]]``."""
    (n, k), d = values.shape, table.shape[1]
    table = in_rows(table)
    out = values.new_empty(n, d, dtype=torch.float32)
    if n and d:
        block = _block(d)
        launch(
            _bag_kernel,
            (n,),
            values.contiguous(),
            indices.contiguous(),
            table,
            out,
            k,
            d,
            table.stride(0),
            SLOTS=min(8, triton.next_power_of_2(max(k, 1))),
            BLOCK=block,
            num_warps=warps(block, 8),
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


@torch.no_grad()
def sampled(x: Tensor, table: Tensor, indices: Tensor) -> Tensor:
    """``(N, k)`` float32 products of rows of ``x (N, d)`` with rows of ``table (F, d)`` at ``indices (N, k)``."""
    (n, k), d = indices.shape, table.shape[1]
    x, table = in_rows(x), in_rows(table)
    out = x.new_empty(n, k, dtype=torch.float32)
    if not out.numel():
        return out
    # one warp, whose 32 threads of 16 bytes each are a block of columns: nothing goes through shared memory, neither x
    # to the layout of the atoms nor the sums
    block = min(triton.next_power_of_2(max(d, 1)), 512 // table.element_size())
    slots = min(1024 // block, triton.next_power_of_2(k))
    n_blocks = triton.cdiv(k, slots)
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
        SLOTS=slots,
        BLOCK=block,
        num_warps=1,
    )
    return out


class Segments(NamedTuple):
    """Entries of a code by latent."""

    order: Tensor  #: ``(N * k,)`` int32: places of the flat code, by latent, within a latent by row.
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
    return Segments(order.to(torch.int32), torch.searchsorted(latents, ids, out_int32=True))


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
        entry = tl.load(order_ptr + first + i + tl.where(i < before, 0, skip), mask=used, other=0)
        row = (entry // k).to(tl.int64)
        value = tl.load(values_ptr + entry, mask=used, other=0).to(tl.float32)
        at = x_ptr + row[:, None] * x_stride + column[None, :]
        x = tl.load(at, mask=used[:, None] & (column < d)[None, :], other=0).to(tl.float32)
        out += tl.sum(value[:, None] * x, 0)
    return out


@triton.jit
def _window_kernel(
    indices_ptr,
    order_ptr,
    starts_ptr,
    values_ptr,
    x_ptr,
    x_stride,
    sums_ptr,
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


@triton.jit
def _scatter_kernel(
    order_ptr,
    starts_ptr,
    values_ptr,
    x_ptr,
    x_stride,
    sums_ptr,
    out_ptr,
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


@torch.no_grad()
def scatter(values: Tensor, indices: Tensor, x: Tensor, n_rows: int, by_latent: Segments | None = None) -> Tensor:
    """``(n_rows, d)`` float32: for each latent the sum of ``x (N, d)`` weighted by its values.

    Segments longer than a window are split, so that a latent of every row takes no longer than others. The order of
    each sum is that of the rows within a window, so results are the same on every run.

    Args:
        values: ``(N, k)``.
        indices: ``(N, k)``, below ``n_rows``.
        x: ``(N, d)``.
        n_rows: Number of latents.
        by_latent: The :func:`segments` of these indices, where they are known.

    Raises:
        ValueError: The inputs are not as many as the codes.
    """
    (n, k), d = indices.shape, x.shape[1]
    if len(x) != n:
        raise ValueError(f"inputs must be ({n}, {d}), not {tuple(x.shape)}")
    if not (n * k * d * n_rows):
        return x.new_zeros(n_rows, d, dtype=torch.float32)
    order, starts = segments(indices, n_rows) if by_latent is None else by_latent
    block, n_windows, x = _block(d), n * k // WINDOW, in_rows(x)
    sums, out = (x.new_empty(rows, d, dtype=torch.float32) for rows in (n_windows, n_rows))
    operands = (values.contiguous(), x, x.stride(0), sums)
    # rows of 8 entries under way at a time, of which a thread has 8 columns each: 64 registers
    sizes = dict(WINDOW=WINDOW, ENTRIES=8, BLOCK=block, num_warps=warps(block, 8))
    if n_windows:
        grid = (n_windows, triton.cdiv(d, block))
        launch(_window_kernel, grid, indices.contiguous(), order, starts, *operands, k, d, **sizes)
    launch(_scatter_kernel, (n_rows, triton.cdiv(d, block)), order, starts, *operands, out, k, d, **sizes)
    return out
