"""Codes by matching pursuit: mmsae over overcomplete and SAELens, in interleaved rounds.

    python -m benchmarks.pursuit [--rounds 5] [--quick]

A case is d/d_sae/steps/batch, with the same atoms from batch to batch, or with others in every batch, as a training has
them: two tables of atoms by turns, whose copy into the contender's weights is on everybody's clock. Codes and
reconstructions are compared with the definition in float64 first.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from itertools import cycle
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.contest import CODES, contest, field
from benchmarks.inference import encoding
from benchmarks.measure import Options, Result, parse, shared
from benchmarks.methods import Contender, Problem

SIZES = (
    Problem("mp", 512, 4096, 32, 512),
    Problem("mp", 512, 4096, 32, 4096),
    Problem("mp", 768, 16384, 32, 512),
)


def new_atoms(contender: Contender, x: torch.Tensor) -> Callable[[], Any]:
    """One run of a contender over other atoms than those of its last run."""
    weight, transposed = contender.weights()["W_dec"]
    first = contender.problem.weights(contender.device)["W_dec"]
    g = torch.Generator().manual_seed(3)
    other = F.normalize(first + 0.01 * torch.randn(first.shape, generator=g).to(first))  # a norm of .2 beside 1
    tables, encode = cycle([t.T if transposed else t for t in (other, first)]), encoding(contender, x, decode=False)

    def run() -> None:
        with torch.no_grad():
            weight.copy_(next(tables))
        encode()

    return run


def run(problem: Problem, options: Options, result: Result) -> bool:
    """Both cases of a size; False where a contender of mmsae's failed or disagrees."""
    contenders, said = field(problem, options, CODES)
    (x,) = problem.rows(options.device).values()
    good = True
    for case, make in ((str(problem), lambda c: encoding(c, x, decode=False)),
                       (f"{problem}, new atoms", lambda c: new_atoms(c, x))):  # fmt: skip
        if options.wants(case):
            runs = {name: make(c) for name, c in contenders.items()}
            good &= contest(result, case, runs, said, problem=vars(problem))
    return good


def main(args: Sequence[str] | None = None) -> int:
    options = parse(__doc__, args)
    result = Result("pursuit", options)
    sizes = (Problem("mp", 16, 64, 4, 32),) if options.quick else [p for p in SIZES if options.wants(f"{p}, new atoms")]
    good = True
    for problem, result.options in shared(sizes, options):
        good &= run(problem, result.options, result)
    result.draw()
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
