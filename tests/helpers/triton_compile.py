"""Compile kernels for a GPU that need not be there: the launches of a function, as far as they are before they run.

Run as a program it prints for every kernel that the calls below launch what a thread of it needs::

    python -m tests.helpers.triton_compile 90 [first words of calls]
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver


class Compiled(NamedTuple):
    """One kernel, as one launch specialised it."""

    kernel: str
    warps: int
    registers: int
    spilled: int  #: Bytes of registers that are in memory, per thread.
    shared: int  #: Bytes per program.


class _Target:
    """As much of a driver as compiling asks for."""

    def __init__(self, capability: int):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of spilled registers of the one kernel in a cubin."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return tuple(int(re.search(rf"{word}:(\d+)", said)[1]) for word in ("REG", "STACK"))


def compile_from_now_on(capability: int) -> list[Compiled]:
    """For the rest of the process, kernels are compiled for a compute capability (90: sm_90) instead of run.

    Returns:
        What was compiled, a list that grows.
    """
    run, found = JITFunction.run, []

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        made = run(self, *args, grid=grid, warmup=True, **kwargs)
        registers, spilled = usage(made.asm["cubin"])
        found.append(Compiled(made.metadata.name, made.metadata.num_warps, registers, spilled, made.metadata.shared))
        return made

    driver.set_active(_Target(capability))
    JITFunction.run = compile_only
    return found


def calls() -> dict[str, Callable[[], Any]]:
    """Calls of every function of the package, at sizes of trainings; few rows, for their number is not compiled in."""
    from mmsae.kernels.triton import optim, pairs, select, sparse

    out = {}
    for name in ("float32", "bfloat16", "float16"):
        for f, k in ((4096, 32), (6144, 256), (32768, 32), (131072, 64), (32768, 1024), (1000, 8), (100, 100)):
            x = torch.empty(4, f, dtype=getattr(torch, name))
            out[f"topk {name} {f} {k}"] = lambda x=x, k=k: select.topk(x, k)
        for f in (100, 32768):
            x, one = torch.empty(4, f, dtype=getattr(torch, name)), torch.empty(())
            out[f"batch_threshold {name} {f}"] = lambda x=x: select.batch_threshold(x, 4 * 32)
            out[f"above {name} {f}"] = lambda x=x, one=one: select.above(x, one, 50)
            out[f"count_above {name} {f}"] = lambda x=x: select.count_above(x, x[0], True)
            out[f"group_max {name} {f}"] = lambda x=x: select.group_max(x, 4)
    x = torch.empty(4, 32768)
    out["topk of products"] = lambda x=x: select.topk(x, 32, True, torch.empty(32768))
    # sizes of 1 are constants of a kernel
    out["topk 1"] = lambda x=x: select.topk(x, 1)
    out["topk 1 1"] = lambda x=x: select.topk(x[:, :1], 1)
    out["batch_threshold 1"] = lambda x=x: select.batch_threshold(x[:, :1], 1)
    out["above 1"] = lambda x=x: select.above(x[:, :1], x[0, 0], 1)
    out["group_max 1"] = lambda x=x: select.group_max(x[:, :1], 1)
    for name in ("float32", "bfloat16"):
        for d, k in ((512, 32), (768, 256), (1024, 64), (100, 7), (4096, 64), (1, 1)):
            values, indices = torch.ones(200, k), torch.arange(k).expand(200, k).contiguous()
            x, table = (torch.empty(n, d, dtype=getattr(torch, name)) for n in (200, 300))
            size = f"{name} {d} {k}"
            out[f"bag {size}"] = lambda v=values, i=indices, t=table: sparse.bag(v, i, t)
            out[f"sampled {size}"] = lambda x=x, i=indices, t=table: sparse.sampled(x, t, i)
            out[f"scatter {size}"] = lambda v=values, i=indices, x=x: sparse.scatter(v, i, x, 300)
    for k in (1, 7, 32, 256, 512):
        a, ids = torch.ones(4, k), torch.arange(k).expand(4, k).contiguous()
        out[f"cosine {k}"] = lambda a=a, i=ids: pairs.cosine(a, i, a, i, 1e-12)
        up = torch.ones(()).expand(4)
        out[f"gradient of cosine {k}"] = lambda a=a, i=ids, u=up: pairs.cosine_gradients(a, i, a, i, u, u, 1e-12)
    for d in (100, 512, 768, 1024, 4096, 16384):
        weight = torch.empty(4, d)
        out[f"adam {d}"] = lambda w=weight: optim.adam_rows_(w, w, w, w, 1, 1e-3, 0.9, 0.999, 1e-8, True)
    return out


if __name__ == "__main__":
    done = compile_from_now_on(int(sys.argv[1]))
    for call, function in calls().items():
        if not call.startswith(tuple(sys.argv[2:]) or ""):
            continue
        before = len(done)
        function()
        for one in done[before:]:
            print(f"{call:28}", *one)
