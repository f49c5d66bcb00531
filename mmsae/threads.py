"""How many CPU threads a job computes with."""

from __future__ import annotations

import os

from mmsae.types import InputError

HELP = (
    "CPU threads of this process; processes that it starts inherit the number. Two jobs on one machine need fewer than "
    "its cores each, or they slow each other down. Default: torch's own, all cores."
)


def use_threads(n: int | None) -> None:
    """Compute with ``n`` threads from now on, and let processes that are started do so; None changes nothing.

    Raises:
        InputError: Fewer than one.
    """
    if n is None:
        return
    if n < 1:
        raise InputError(f"threads is {n}; it must be at least 1")
    import torch

    os.environ |= {"OMP_NUM_THREADS": str(n), "MKL_NUM_THREADS": str(n)}
    torch.set_num_threads(n)
