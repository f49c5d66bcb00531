"""One optimiser step of mmsae, of naive dense steps and of other libraries, in interleaved rounds.

    python -m benchmarks.train_step                        # every case of the device, within a minute each
    python -m benchmarks.train_step --cases 'topk 512/8192' --rounds 15
    python -m benchmarks.train_step --quick                # does everything run and agree?

A case is METHOD d/d_sae/k/batch. Before any time is taken, every contender's first loss and gradients are compared with
the dense formula in float64 (:mod:`benchmarks.methods`), on at most 256 rows; who disagrees is named. Every contender
does the same: forward, backward, its own constraint on the dictionary, fused Adam.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Mapping, Sequence
from functools import partial

import torch

from benchmarks.contest import STEP, contest, field
from benchmarks.measure import (
    Options,
    Result,
    Timing,
    copy_bandwidth,
    device_floor,
    parse,
    peak_memory,
    products,
    shared,
)
from benchmarks.methods import Problem

SMALL = {"topk_auxk": (16, 200, 6, 32), "vl_sae": (16, 64, 8, 32), "mp": (16, 64, 4, 32)}  # --quick
METHODS = ("topk", "topk_auxk", "batch_topk", "vl_sae", "paired_topk", "matryoshka", "mp")
ON_CPU = (
    Problem("topk", 512, 8192, 32, 2048),  # A
    Problem("topk", 768, 16384, 32, 1024),  # B
    Problem("topk_auxk", 512, 8192, 32, 2048),
    Problem("batch_topk", 512, 8192, 32, 2048),
    Problem("vl_sae", 512, 4096, 256, 512),
    Problem("paired_topk", 512, 4096, 32, 1024),
    Problem("matryoshka", 512, 8192, 32, 2048),
    Problem("mp", 512, 4096, 32, 512),
)
ON_CUDA = (
    # first those that have bounds in benchmarks/goals.py, should the time not be enough for all
    Problem("topk", 768, 6144, 32, 4096),
    Problem("paired_topk", 768, 6144, 32, 4096),
    Problem("topk", 1024, 32768, 32, 16384),
    Problem("topk", 1024, 131072, 64, 8192),
    Problem("vl_sae", 512, 4096, 256, 512),
    Problem("topk", 512, 4096, 32, 4096),
    Problem("topk", 768, 6144, 256, 2048),
    Problem("topk", 1024, 32768, 32, 4096),
    Problem("topk_auxk", 768, 6144, 32, 4096),
    Problem("topk_auxk", 1024, 32768, 32, 16384),
    Problem("batch_topk", 768, 6144, 32, 4096),
    Problem("batch_topk", 1024, 32768, 32, 16384),
    Problem("paired_topk", 1024, 32768, 32, 16384),
    Problem("matryoshka", 1024, 32768, 32, 4096),
    Problem("mp", 512, 4096, 32, 512),
)


def problems(options: Options) -> list[Problem]:
    """The cases that were asked for."""
    found = ON_CUDA if options.cuda else ON_CPU
    if options.quick:
        found = tuple(Problem(m, *SMALL.get(m, (16, 48, 4, 16))) for m in METHODS)
    return [p for p in found if options.wants(str(p))]


def run(problem: Problem, options: Options, result: Result, bandwidth: float) -> bool:
    """One case; False where a contender of mmsae's failed or disagrees."""
    contenders, said = field(problem, options, STEP)
    x = problem.rows(options.device)
    measured = ["mmsae"] if options.quick else list(contenders)  # watching takes longer than the smallest steps
    for name, contender in [(name, contenders[name]) for name in measured if name in contenders]:
        try:
            said[name].memory = peak_memory(partial(contender, x), options)
        except torch.OutOfMemoryError:
            said[name].note = "out of memory"
            del contenders[name]
    weights = problem.weights(options.device)
    floors = products(next(iter(x.values())), next(iter(weights.values())), options)

    def floor(timings: Mapping[str, Timing]) -> dict[str, float]:
        product, p = timings["product bf16"].median, problem
        if not options.cuda or p.method != "topk" or product is None:
            return {}
        ms = device_floor(p.d, p.d_sae, p.k, p.batch, product, bandwidth)
        return {"floor: product bf16 and bytes": ms}

    # every contender has done two steps by then, and no more are needed before the first round
    runs = {name: partial(contender, x) for name, contender in contenders.items()}
    warm = int(options.quick)
    return contest(result, str(problem), runs, said, floors, warm, floor, problem=vars(problem))


def main(args: Sequence[str] | None = None) -> int:
    options = parse(__doc__, args)
    result, good = Result("train_step", options), True
    bandwidth = copy_bandwidth(options)
    result.add("copy", f"{bandwidth / 1e9:,.0f} GB/s, read and written", bytes_per_second=bandwidth)
    for problem, result.options in shared(problems(options), options):
        good &= run(problem, result.options, result, bandwidth)
        gc.collect()
        if options.cuda:
            torch.cuda.empty_cache()
    result.draw()
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
