"""The precision of the operands of an encoder's product."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from mmsae.types import InputError

if TYPE_CHECKING:
    from torch import Tensor

PRECISIONS = ("fp32", "tf32", "bf16")


def check_precision(name: str | None) -> None:
    """Refuse what is no precision of the encoder's product.

    Raises:
        InputError: It is neither None nor one of ``fp32``, ``tf32`` and ``bf16``.
    """
    if name is not None and name not in PRECISIONS:
        raise InputError(f"precision must be one of {', '.join(PRECISIONS)}, not {name!r}")


def effective(precision: str | None, x: Tensor) -> str:
    """The precision that a product of rows ``x`` has: by the device where none is given.

    There is no ``tf32`` but on CUDA, and rows that are not float32 keep their own precision (``fp32`` then means that
    nothing is converted).
    """
    import torch

    if x.dtype != torch.float32:
        return "fp32"
    if precision in (None, "tf32"):
        return "tf32" if x.device.type == "cuda" else "fp32"
    return precision


def no_autocast(like: Tensor) -> AbstractContextManager:
    """No autocast on the device of a tensor; where there is none anyway nothing is done, which takes less time."""
    import torch

    kind = like.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
