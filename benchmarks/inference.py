"""Codes of rows, and their reconstruction: mmsae, naive dense torch and other libraries, in interleaved rounds.

    python -m benchmarks.inference [--cases 'encode 512/8192'] [--quick]

Cases are ``encode`` (codes in the library's own form) and ``encode, decode`` at d/d_sae/k/batch, without gradients.
Before any time is taken, codes and reconstructions are compared with the dense formula in float64.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.contest import CODES, contest, field
from benchmarks.measure import Options, Result, parse, products, shared
from benchmarks.methods import Contender, Problem

ON_CPU = (Problem("topk", 512, 8192, 32, 2048), Problem("topk", 768, 16384, 32, 1024))
ON_CUDA = (
    Problem("topk", 768, 6144, 32, 4096),
    Problem("topk", 1024, 32768, 32, 16384),
    Problem("topk", 1024, 131072, 64, 8192),
)


def encoding(contender: Contender, x: torch.Tensor, decode: bool) -> Callable[[], Any]:
    """One run of a contender."""

    def run() -> None:
        with torch.no_grad(), contender.context():
            codes = contender.encode(x)
            if decode:
                contender.decode(codes)

    return run


def run(problem: Problem, options: Options, result: Result) -> bool:
    """Both cases of a size; False where a contender of mmsae's failed or disagrees."""
    contenders, said = field(problem, options, CODES)
    (x,) = problem.rows(options.device).values()
    good = True
    for decode in (False, True):
        case = f"{'encode, decode' if decode else 'encode'} {str(problem).split(' ', 1)[1]}"
        if not options.wants(case):
            continue
        runs = {name: encoding(c, x, decode) for name, c in contenders.items()}
        floors = products(x, problem.weights(options.device)["W_enc"], options)
        good &= contest(result, case, runs, said, floors, problem=vars(problem))
    return good


def main(args: Sequence[str] | None = None) -> int:
    options = parse(__doc__, args)
    result = Result("inference", options)
    sizes = ON_CUDA if options.cuda else ON_CPU
    if options.quick:
        sizes = (Problem("topk", 16, 48, 4, 16),)
    good = True
    for problem, result.options in shared(sizes, options):
        good &= run(problem, result.options, result)
    result.draw()
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
