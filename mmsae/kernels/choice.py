"""Which backend computes: the device's own, or the one that ``MMSAE_KERNELS`` or :func:`use` names.

On CUDA it is ``triton``, where Triton is installed and the device has compute capability 8.0 or more; else it is
``torch``. Float64 is always left to ``torch`` or ``reference``.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from mmsae.errors import Warned
from mmsae.kernels.backend import Backend
from mmsae.kernels.plain import TorchBackend
from mmsae.kernels.reference import ReferenceBackend
from mmsae.types import InputError

VARIABLE = "MMSAE_KERNELS"
NAMES = ("reference", "torch", "triton")
CAPABILITY = (8, 0)

_forced: ContextVar[str | None] = ContextVar("forced", default=None)


@contextmanager
def use(name: str) -> Iterator[None]:
    """Compute with one backend here, whatever the device and the environment say.

    Args:
        name: ``reference``, ``torch`` or ``triton``.

    Raises:
        InputError: There is no such backend.
    """
    token = _forced.set(_known(name, "mmsae.kernels.use"))
    try:
        yield
    finally:
        _forced.reset(token)


def backend_for(x: Tensor) -> Backend:
    """The backend that computes on tensors like ``x``.

    Raises:
        InputError: ``MMSAE_KERNELS`` names no backend.
    """
    name = _forced.get() or os.environ.get(VARIABLE)
    if name:
        _known(name, VARIABLE)
    else:
        name = "triton" if x.device.type == "cuda" else "torch"
    if name == "triton" and (x.dtype == torch.float64 or _without_triton(x.device)):
        name = "torch"
    return _made(name)


def described(device: torch.device) -> str:
    """The name of the backend that computes float32 on a device, and why where it is not the device's best."""
    name = backend_for(torch.empty(0, device=device)).name
    wanted = _forced.get() or os.environ.get(VARIABLE) or ("triton" if device.type == "cuda" else name)
    return name if name == wanted else f"{name} ({_why_not(device)})"


def _known(name: str, source: str) -> str:
    if name not in NAMES:
        raise InputError(f"{source} must be one of {', '.join(NAMES)}, not {name!r}")
    return name


@cache
def _made(name: str) -> Backend:
    if name == "triton":
        from mmsae.kernels.triton.backend import TritonBackend

        return TritonBackend()
    return {"torch": TorchBackend, "reference": ReferenceBackend}[name]()


@cache
def _without_triton(device: torch.device) -> bool:
    """Whether Triton cannot compute on a device; said once."""
    if why := _why_not(device):
        warnings.warn(f"mmsae's kernels for {device.type} are those of torch: {why}", Warned, stacklevel=3)
    return bool(why)


def _why_not(device: torch.device) -> str:
    """Why Triton cannot compute on a device; empty where it can."""
    if not find_spec("triton"):
        return "Triton is not installed"
    if device.type == "cuda":
        found = torch.cuda.get_device_capability(device)
        return "" if found >= CAPABILITY else f"Triton's need compute capability 8.0, not {found[0]}.{found[1]}"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return ""
    return f"Triton's run on CUDA, and not on {device.type}"
