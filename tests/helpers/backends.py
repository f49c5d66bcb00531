"""Backends of ``mmsae.kernels`` as test parameters: Triton's kernels run interpreted where there is no device."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch


def interpreted() -> bool:
    """Whether this process runs Triton's kernels on the CPU; see ``tests/conftest.py``."""
    if not find_spec("triton"):
        return False
    from triton.runtime.interpreter import InterpretedFunction

    from mmsae.kernels.triton import sparse

    return isinstance(sparse._bag_kernel, InterpretedFunction)


INTERPRETED = interpreted()
TRITON = pytest.param("triton", marks=() if INTERPRETED else pytest.mark.gpu)
BACKENDS = ["reference", "torch", TRITON]


def place(name: str) -> str:
    """The device on which this process can compute with a backend; skips where there is none."""
    if name != "triton" or INTERPRETED:
        return "cpu"
    if not find_spec("triton") or not torch.cuda.is_available():
        pytest.skip("no Triton, or no CUDA device")
    return "cuda"
