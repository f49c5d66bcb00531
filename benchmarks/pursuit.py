"""Codes by matching pursuit: mmsae over overcomplete and SAELens, in interleaved rounds.

    python -m benchmarks.pursuit [--rounds 5] [--quick]

A case is d/d_sae/steps/batch. Codes and reconstructions are compared with the definition in float64 first.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from benchmarks.contest import CODES, contest, field
from benchmarks.inference import encoding
from benchmarks.measure import Options, Result, parse, shared
from benchmarks.methods import Problem

SIZES = (
    Problem("mp", 512, 4096, 32, 512),
    Problem("mp", 512, 4096, 32, 4096),
    Problem("mp", 768, 16384, 32, 512),
)


def run(problem: Problem, options: Options, result: Result) -> bool:
    """One size; False where a contender of mmsae's failed or disagrees."""
    contenders, said = field(problem, options, CODES)
    (x,) = problem.rows(options.device).values()
    runs = {name: encoding(c, x, decode=False) for name, c in contenders.items()}
    return contest(result, str(problem), runs, said, problem=vars(problem))


def main(args: Sequence[str] | None = None) -> int:
    options = parse(__doc__, args)
    result = Result("pursuit", options)
    sizes = (Problem("mp", 16, 64, 4, 32),) if options.quick else [p for p in SIZES if options.wants(str(p))]
    good = True
    for problem, result.options in shared(sizes, options):
        good &= run(problem, result.options, result)
    result.draw()
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
