"""What every launch needs: operands in rows, and how many warps share a program's work."""

from __future__ import annotations

import triton
from torch import Tensor


def in_rows(matrix: Tensor) -> Tensor:
    """The matrix with neighbouring columns next to each other in memory; its rows may be apart."""
    return matrix if matrix.shape[1] <= 1 or matrix.stride(1) == 1 else matrix.contiguous()


def warps(elements: int, each: int, most: int = 16) -> int:
    """Warps with which a thread has about ``each`` of the elements of a program, a power of two up to ``most``."""
    return max(1, min(most, triton.next_power_of_2(elements) // (32 * each)))
