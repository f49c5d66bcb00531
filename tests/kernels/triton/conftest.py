"""Kernels run compiled where there is a CUDA device, and in triton's interpreter on the CPU where there is none."""

import pytest
import torch

triton = pytest.importorskip("triton")

INTERPRETED = isinstance(triton.jit(lambda: None), triton.runtime.interpreter.InterpretedFunction)


@pytest.fixture(params=["cpu"] if INTERPRETED else [pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Where this process can run kernels."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.fail("triton was imported before tests/conftest.py could ask for its interpreter")
    return request.param
