"""What the host does in a training step on a GPU, counted and timed on a machine that need not have one.

    python -m benchmarks.host_work [--cases topk] [--quick]

Counts are those of tensors without memory that say they are on CUDA (torch's fake tensors), at the sizes of the case:
every operation that torch dispatches below autograd, and which of them start a kernel (views and allocations do not),
launches of Triton's kernels, nodes of autograd, copies between host and device, and float32 tensors of
``batch * d_sae`` entries. An operation for whose result the host would have to wait ends the benchmark with an error.

Times are of the CPU, at sizes at which there is next to nothing to compute. Launches are bound and looked up as for a
GPU, but nothing is compiled and nothing runs. What CUDA's driver takes is not in it: 2 to 4 us for every kernel.
"""

from __future__ import annotations

import ctypes
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.measure import Options, Result, parse
from benchmarks.methods import Ours, Problem
from mmsae.kernels import choice
from mmsae.report.tables import markdown_table
from mmsae.sae import precodes, usage

USUAL, LARGE, WIDE = (768, 6144, 32, 4096), (1024, 32768, 32, 16384), (1024, 131072, 64, 8192)
CASES = (
    *(Problem(method, *USUAL) for method in ("topk", "topk_auxk", "paired_topk")),
    Problem("topk", *LARGE),
    *(Problem(method, *WIDE) for method in ("topk", "topk_auxk")),
)
TINY = dict(d=8, d_sae=240, k=4, batch=16)  # 24 dead latents, of which AuxK takes 4
NO_KERNEL = {
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "device", "lift_fresh", "detach"),
    *("_record_function_enter_new", "_record_function_exit", "_unsafe_view", "_local_scalar_dense"),
}


@dataclass
class Work:
    """What the host does in a step."""

    operations: Counter = field(default_factory=Counter)  #: Of torch, by name.
    kernels: int = 0  #: Those of them that start one, at least.
    launches: Counter = field(default_factory=Counter)  #: Of Triton's kernels, by name.
    nodes: Counter = field(default_factory=Counter)  #: Of autograd, by name; without those that keep gradients.
    copies: int = 0  #: Between host and device.
    wide: int = 0  #: float32 tensors of ``batch * d_sae`` entries.

    def figures(self) -> dict[str, int]:
        """Numbers for a table."""
        return {
            "operations": self.operations.total(),
            "kernels of torch": self.kernels,
            "launches of Triton": self.launches.total(),
            "nodes": self.nodes.total(),
            "copies": self.copies,
            "float32 (batch, d_sae)": self.wide,
        }


class _Counted(TorchDispatchMode):
    """Counts into a :class:`Work`."""

    def __init__(self, work: Work, wide: int) -> None:
        super().__init__()
        self.work, self.wide = work, wide

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        out = func(*args, **(kwargs or {}))
        if name == "device":  # asked of fake tensors alone
            return out
        self.work.operations[name] += 1
        self.work.kernels += not (func.is_view or name in NO_KERNEL)
        tensors = [t for t in (out if isinstance(out, (tuple, list)) else (out,)) if isinstance(t, Tensor)]
        given = {t.device.type for t in (*args, *tensors) if isinstance(t, Tensor) and (t.dim() or name != "mul")}
        self.work.copies += len(given) > 1 and name in ("_to_copy", "copy_")
        if not func.is_view:
            self.work.wide += sum(t.dtype == torch.float32 and t.numel() >= self.wide for t in tensors)
        return out


# ----------------------------------------------------------------------------------------------- without a device
class _Known:
    """In place of :class:`mmsae.device.Ahead`: the number of dead latents is known."""

    number = sent = 0

    def __init__(self, device: torch.device) -> None:
        pass

    def send(self, number: Tensor) -> None:
        type(self).sent += 1

    def get(self) -> int:
        return self.number


@contextmanager
def without_device(problem: Problem) -> Iterator[None]:
    """Take the path of a GPU: Triton's backend, and numbers that are sent ahead."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(choice, "_why_not", lambda device: ""))
        choice._without_triton.cache_clear()
        stack.callback(choice._without_triton.cache_clear)
        stack.enter_context(patch.object(usage, "Ahead", _Known))
        stack.enter_context(patch.multiple(_Known, number=int(problem.dead("cpu").sum()), sent=0))
        stack.enter_context(patch.object(usage, "waits", lambda t: True))
        stack.enter_context(patch.object(precodes, "PARTS", 1))  # as they are on a GPU
        yield


def count(problem: Problem, precision: str = "bf16") -> Work:
    """The work of one step, as it is after the first two."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from mmsae.kernels.triton import launch

    work = Work()

    def launched(kernel: Any, *args: Any, **options: Any) -> None:
        work.launches[kernel.fn.__name__] += 1

    with without_device(problem), patch.object(launch, "run", launched), FakeTensorMode(), _no_values():
        step = Ours(problem, "cuda", "triton", precision)
        x = {m: torch.empty(problem.batch, problem.d, device="cuda") for m in problem.modalities}
        for _ in range(3):
            for found in (work.operations, work.launches, work.nodes):
                found.clear()
            work.kernels = work.copies = work.wide = _Known.sent = 0
            with _Counted(work, problem.batch * problem.d_sae), patch.object(Tensor, "backward", _backward(work)):
                step(x)
            work.copies += _Known.sent
    return work


@contextmanager
def _no_values() -> Iterator[None]:
    """Weights without memory are as they are."""
    with (
        patch.object(Problem, "weights", lambda self, device: {}),
        patch.object(Problem, "dead", lambda self, device: torch.zeros(self.d_sae, dtype=torch.bool, device=device)),
    ):
        yield


def _backward(work: Work) -> Callable[[Tensor], None]:
    """Autograd's pass without its engine, which asks CUDA for its streams."""

    def backward(loss: Tensor, *args: Any) -> None:
        left, stack = Counter(), [loss.grad_fn]
        seen = {*stack}
        while stack:
            for after, _ in stack.pop().next_functions:
                left[after] += 1
                if after is not None and after not in seen:
                    seen.add(after)
                    stack.append(after)
        given: dict[Any, dict[int, Tensor]] = {loss.grad_fn: {0: torch.ones_like(loss)}}
        ready = [loss.grad_fn]
        while ready:
            node = max(ready, key=lambda n: n._sequence_nr())
            ready.remove(node)
            found = given.pop(node, {})
            if hasattr(node, "variable"):
                node.variable.grad = found.get(0)
                continue
            work.nodes[node.name()] += 1
            for (after, i), grad in _called(node, [found.get(i) for i in range(max(found, default=0) + 1)]):
                if grad is not None:
                    shape, slots = torch.Size(after._input_metadata[i].shape), given.setdefault(after, {})
                    grad = grad if grad.shape == shape else grad.sum_to_size(shape)
                    slots[i] = slots[i] + grad if i in slots else grad
                left[after] -= 1
                if not left[after]:
                    ready.append(after)

    return torch.no_grad()(backward)


def _called(node: Any, grads: Sequence[Tensor | None]) -> Iterator[tuple[tuple[Any, int], Tensor | None]]:
    """What a node passes on, and to whom."""
    ours = isinstance(node, torch.autograd.function.BackwardCFunction)
    if ours and len(grads) < (n := len(node._input_metadata)):
        grads = [*grads, *[None] * (n - len(grads))]
    if ours:
        grads = [
            torch.zeros(meta.shape, dtype=meta.dtype, device=meta.device) if g is None else g
            for g, meta in zip(grads, node._input_metadata, strict=True)
        ]
    out = node.apply(*grads) if ours else node(*grads)
    out = out if isinstance(out, tuple) else (out,)
    if ours:  # it answers for what is no tensor, too
        out = [g for g, needed in zip(out, node.needs_input_grad, strict=True) if needed]
    return zip([e for e in node.next_functions if e[0] is not None] if ours else node.next_functions, out, strict=False)


# ---------------------------------------------------------------------------------------------------------- times
class _Nothing:
    """In place of a compiled kernel: what the kernel would write is 0."""

    function = packed_metadata = None

    def __init__(self, written: Sequence[int]) -> None:
        self.written = written

    def launch_metadata(self, *args: Any) -> None:
        return None

    def run(self, gx: int, gy: int, gz: int, stream: int, function: None, metadata: None, *args: Any) -> None:
        for i in self.written:
            if (t := args[3 + i]) is not None:
                ctypes.memset(t.data_ptr(), 0, t.nbytes)


# places of what is written, among the operands
WRITTEN = {
    "_maxima_kernel": (2,),
    "_topk_kernel": (3, 4),
    "_bag_kernel": (4,),
    "_sampled_kernel": (3,),
    "_scatter_kernel": (7, 8),
    "_cosine_kernel": (4,),
    "_cosine_gradient_kernel": (6, 7),
}


class _NoDriver:
    """As much of a driver as looking a kernel up asks for."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def bound_only(problem: Problem) -> Iterator[list[str]]:
    """Triton looks up what it would start, and starts nothing; yields the names of kernels that it would compile."""
    from triton.runtime import JITFunction, driver

    compiled: list[str] = []

    def compile_(self: Any, key: Any, *args: Any) -> _Nothing:
        compiled.append(self.fn.__name__)
        kernel = self.device_caches[0][0][key] = _Nothing(WRITTEN.get(self.fn.__name__, ()))
        return kernel

    with without_device(problem), patch.object(driver, "_active", _NoDriver()):
        with patch.object(JITFunction, "_do_compile", compile_):
            yield compiled


class Timed(NamedTuple):
    """Microseconds of the CPU for one step."""

    step: float  #: Median of the rounds.
    best: float  #: Of the rounds.
    compiled: int  #: Kernels that the first steps would compile.
    later: int  #: And the others, which is too many where it is not 0.


def timed(what: Callable[[], Any], compiled: Sequence[str], rounds: int = 15, inner: int = 20) -> Timed:
    """Time steps, after five that compile and allocate."""
    for _ in range(5):
        what()
    first, found = len(compiled), []
    for _ in range(rounds):
        start = time.thread_time()
        for _ in range(inner):
            what()
        found.append(1e6 * (time.thread_time() - start) / inner)
    return Timed(statistics.median(found), min(found), first, len(compiled) - first)


def time_step(problem: Problem, options: Options, precision: str = "bf16") -> Timed:
    """The time of a step of the problem's method."""
    problem = replace(problem, **TINY)
    with bound_only(problem) as compiled:
        step, x = Ours(problem, "cpu", "triton", precision), problem.rows("cpu")
        return timed(lambda: step(x), compiled, *((2, 2) if options.quick else ()))


def main(args: Sequence[str] | None = None) -> int:
    options = parse(__doc__, args)
    result, columns, facts = Result("host_work", options), {}, {}
    for problem in CASES:
        if not options.wants(str(problem)):
            continue
        work = count(problem)
        columns[str(problem)] = figures = work.figures()
        facts[str(problem)] = {name: dict(v) if isinstance(v, Counter) else v for name, v in vars(work).items()}
        if not interpreted():
            took = time_step(problem, options)
            facts[str(problem)]["time"] = took._asdict()
            figures["us of the CPU, median"] = round(took.step)
            figures["kernels compiled"], figures["in later steps"] = took.compiled, took.later
    if not columns:
        return 0
    rows = [[name, *(f"{c[name]:,}" for c in columns.values())] for name in next(iter(columns.values()))]
    result.add("host work of a step", markdown_table(["", *columns], rows), work=facts)
    return 0


def interpreted() -> bool:
    """Whether kernels are Triton's interpreter's here, which binds nothing."""
    return os.environ.get("TRITON_INTERPRET") == "1"


if __name__ == "__main__":
    sys.exit(main())
