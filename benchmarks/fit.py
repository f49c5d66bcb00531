"""Steps a second of ``mmsae fit`` from a store, beside the same step in a bare loop.

    python -m benchmarks.fit [--quick]

Every round runs ``mmsae fit -c configs/train/topk_store.yaml`` twice, with few and with many steps: the difference is
what the steps cost, without starting up. The bare loop is ``mmsae.training.plain`` on batches that lie on the device
already. A case is d/d_sae/k/batch; on CUDA time is that of the wall clock, with the store read batch by batch and held
on the device.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.measure import Options, Result, Timing, first_line, parse, quartiles, shared
from benchmarks.methods import Problem
from mmsae.activations import write_store
from mmsae.cli import main as mmsae
from mmsae.report.tables import markdown_table
from mmsae.sae import SAE, AuxK, Reconstruction, TopK
from mmsae.training.plain import train

RECIPE = Path(__file__).parents[1] / "configs" / "train" / "topk_store.yaml"
ON_CPU = ((Problem("topk", 256, 2048, 16, 512), 40_000),)
ON_CUDA = ((Problem("topk", 768, 6144, 32, 4096), 343_000),)
STEPS = {"quick": (2, 4), "cpu": (20, 120), "cuda": (200, 1200)}


def now(options: Options) -> float:
    """Seconds: of the process on a CPU, of the wall clock on CUDA."""
    if options.cuda:
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def fit(problem: Problem, options: Options, store: Path, steps: int, more: Sequence[str]) -> float:
    """Seconds of one ``mmsae fit``.

    Raises:
        RuntimeError: It failed; with the last line of what it said.
    """
    with tempfile.TemporaryDirectory() as root, io.StringIO() as said:
        args = ["fit", "-c", str(RECIPE), "--data.store", str(store), "--data.batch_size", str(problem.batch)]
        args += ["--model.sae.ratio", str(problem.d_sae / problem.d), "--trainer.max_steps", str(steps)]
        args += ["--model.sae.selector.k", str(problem.k), "--trainer.default_root_dir", root]
        args += ["--trainer.enable_progress_bar", "false", "--trainer.val_check_interval", str(10 * steps)]
        args += ["--trainer.accelerator", "gpu" if options.cuda else "cpu", *more]
        start = now(options)
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            try:
                mmsae(args)
            except SystemExit as end:
                if end.code:
                    raise RuntimeError((said.getvalue().strip().splitlines() or ["nothing said"])[-1]) from end
        return now(options) - start


def bare(problem: Problem, options: Options, rows: torch.Tensor, steps: int) -> float:
    """Seconds of so many steps in a bare loop."""
    sae = SAE(problem.d, problem.d_sae, modalities=["image"], selector=TopK(problem.k))
    sae.fit_normaliser({"image": rows})
    sae.to(options.device)
    device = rows.to(options.device)
    batches = itertools.cycle(
        [{"image": device[i : i + problem.batch]} for i in range(0, 4 * problem.batch, problem.batch)]
    )
    terms = [Reconstruction(), AuxK()]
    train(sae, terms, batches, 3)
    start = now(options)
    train(sae, terms, batches, steps)
    return now(options) - start


def ways(problem: Problem, options: Options, store: Path, rows: torch.Tensor) -> dict[str, Callable[[], float]]:
    """What is timed, each as milliseconds a step."""
    few, many = STEPS["quick" if options.quick else "cuda" if options.cuda else "cpu"]

    def by_difference(*more: str) -> Callable[[], float]:
        return lambda: (
            1e3 * (fit(problem, options, store, many, more) - fit(problem, options, store, few, more)) / (many - few)
        )

    return {
        "bare step": lambda: 1e3 * bare(problem, options, rows, many) / many,
        "mmsae fit": by_difference(),
        "mmsae fit, resident": by_difference("--data.resident", "true"),
    }


def run(problem: Problem, n_rows: int, options: Options, result: Result, folder: Path) -> bool:
    """One size."""
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(n_rows, problem.d, generator=g)
    store = write_store(folder / str(problem).replace("/", "_"), {"image": rows}, dtype="bfloat16")
    timings = {name: Timing() for name in ways(problem, options, store, rows)}
    start, rounds = time.perf_counter(), 0
    while rounds < options.rounds and (not rounds or time.perf_counter() - start < options.seconds):
        for name, way in ways(problem, options, store, rows[: 4 * problem.batch]).items():
            if timings[name].note:
                continue
            try:
                timings[name].ms.append(way())
            except (RuntimeError, ImportError) as error:
                timings[name].note, timings[name].ms = f"failed: {first_line(error)}", []
        rounds += 1
    table, base = [], timings["bare step"]
    for name, timing in timings.items():
        if not timing.ms:
            table.append([name, None, None, timing.note])
            continue
        low, middle, high = quartiles(timing.ms)
        over = f"{middle / base.median:.2f}" if base.ms and name != "bare step" else None
        table.append([name, f"{middle:.4g} ({low:.4g} to {high:.4g})", f"{1e3 / middle:.1f}", over])
    case = f"{str(problem).split(' ', 1)[1]}, store of {n_rows:,} rows"
    head = ["", "ms a step", "steps a second", "times the bare step"]
    result.add(case, markdown_table(head, table), timings, problem=vars(problem), rows=n_rows)
    return all(t.ms for t in timings.values())


def main(args: Sequence[str] | None = None) -> int:
    options = parse(__doc__, args)
    result, good = Result("fit", options), True
    sizes = ON_CUDA if options.cuda else ON_CPU
    if options.quick:
        sizes = ((Problem("topk", 16, 128, 4, 32), 256),)
    with tempfile.TemporaryDirectory() as folder:
        sizes = [size for size in sizes if options.wants(str(size[0]))]
        for (problem, rows), result.options in shared(sizes, options):
            good &= run(problem, rows, result.options, result, Path(folder))
    result.draw()
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
