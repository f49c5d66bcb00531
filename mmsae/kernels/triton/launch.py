"""Launches of kernels, their operands in rows, and how many warps share a program's work."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def launch(kernel: Any, grid: tuple[int, ...], *operands: Any, **options: Any) -> None:
    """Run a kernel on the device of its first operand."""
    run(kernel, grid, *operands, **options)


def run(kernel: Any, grid: tuple[int, ...], *operands: Any, **options: Any) -> None:
    """:func:`launch`, for who wants to know of every one."""
    with torch.cuda.device_of(operands[0]):
        # triton's default changes with its version (3.10), and with it the last bit of sums of products
        kernel[grid](*operands, enable_fp_fusion=True, **options)


def in_rows(matrix: Tensor) -> Tensor:
    """The matrix with neighbouring columns next to each other in memory; its rows may be apart."""
    return matrix if matrix.shape[1] <= 1 or matrix.stride(1) == 1 else matrix.contiguous()


def cdiv(a: int, b: int) -> int:
    """``a / b``, rounded up; triton's own takes longer than a launch should."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is not below n, which is at least 1."""
    return 1 << (n - 1).bit_length()


def warps(elements: int, each: int, most: int = 16) -> int:
    """Warps with which a thread has about ``each`` of the elements of a program, a power of two up to ``most``."""
    return max(1, min(most, next_power_of_2(elements) // (32 * each)))
