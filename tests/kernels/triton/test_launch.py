"""Every kernel compiles for GPUs, for which none is needed: the interpreter forgives types that a compiler refuses."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton

import mmsae.kernels.triton
from mmsae.kernels.triton import launch

BIN = Path(triton.__file__).parent / "backends/nvidia/bin"
CALLS = [
    "topk float32 32768 32",
    "topk bfloat16 6144",
    "topk float16 1000",
    "topk 1",
    "batch_threshold bfloat16 32768",
    "above float32 32768",
    "count_above bfloat16 100",
    "group_max float16 32768",
    "bag float32 1 1",
    "bag bfloat16 768",
    "sampled bfloat16 1024",
    "scatter bfloat16 768",
    "scatter float32 1 1",
    "adam 768",
    "cosine 256",
    "gradient of cosine 256",
]


@pytest.mark.slow
@pytest.mark.skipif(not (BIN / "ptxas").exists(), reason="triton comes without ptxas here")
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_without_a_device(capability, tmp_path):
    env = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-W", "ignore", "-m", "tests.helpers.triton_compile", str(capability), *CALLS]
    done = subprocess.run(command, env=env, cwd=Path(__file__).parents[3], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line.rsplit(maxsplit=5) for line in done.stdout.splitlines()]
    for call, kernel, _warps, registers, spilled, _shared in lines:
        assert int(registers) < 256 and int(spilled) <= 16, (call, kernel, registers, spilled)
    sources = "".join(p.read_text() for p in Path(mmsae.kernels.triton.__file__).parent.glob("*.py"))
    assert {kernel for _, kernel, *_ in lines} == set(re.findall(r"def (_\w+_kernel)\(", sources))


@pytest.mark.parametrize(("elements", "each", "most", "wanted"), [(1, 8, 4, 1), (1024, 8, 16, 4), (10**6, 8, 32, 32)])
def test_warps(elements, each, most, wanted):
    assert launch.warps(elements, each, most) == wanted


def test_rows_are_copied_only_where_columns_are_apart():
    matrix = torch.zeros(6, 8)
    assert launch.in_rows(matrix[::2, 3:]).data_ptr() == matrix[:, 3:].data_ptr()
    assert launch.in_rows(matrix.t()).stride(1) == 1 and launch.in_rows(matrix[:, :1].t()[:, :1]).shape == (1, 1)
