"""What the benchmarks of speed share: rounds, clocks, floors, memory, options, and the files that a run leaves.

Contenders are timed in *rounds*: each runs every contender once, in an order that rotates, so that whatever slows the
machine slows all of them alike. Figures are medians over the rounds with their quartiles, ratios medians of paired
ratios. On a CPU time is that of the process at the threads given, on CUDA between two events around some steps.
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # its profiler would say at every start that there is no GPU

import torch
from torch import Tensor
from torch.nn import functional as F

from mmsae.allocator import OWN, keep_memory
from mmsae.files import write_json
from mmsae.report.tables import markdown_table

PEERS = {
    "overcomplete": "overcomplete",
    "sae-lens": "sae-lens",
    "dictionary-learning": "dictionary-learning",
    "sparsify": "eai-sparsify",
}
ALLOCATORS = (*OWN, "LD_PRELOAD", "GLIBC_TUNABLES", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
INNER = 5  # steps between two CUDA events: one is too short for them, and steps follow each other in a training


@dataclass(frozen=True)
class Options:
    """What every benchmark of speed is asked; its command line is :func:`parse`."""

    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    threads: int = 1  #: Of torch, on a CPU.
    rounds: int = 11  #: At most.
    seconds: float = 60.0  #: Of wall clock a case; at least three rounds are done, whatever they take.
    budget: float = 0.0  #: Of wall clock in all, shared by the cases that are left; 0: none.
    quick: bool = False  #: Smallest sizes and one round: whether everything runs and agrees, not how fast it is.
    cases: tuple[str, ...] = ()  #: Names that a case must contain one of; none: all.
    skip: tuple[str, ...] = ()  #: Contenders that are left out.
    keep_memory: bool = False  #: Whether all of them have the allocator of mmsae's commands; else it is the system's.
    out: Path = Path("runs/benchmarks")

    @property
    def cuda(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.startswith("cuda")

    def wants(self, case: str) -> bool:
        """Whether a case was asked for."""
        return not self.cases or any(part in case for part in self.cases)


def parse(doc: str | None, args: Sequence[str] | None = None) -> Options:
    """Options from a command line; sets torch's threads, and leaves torch's other settings alone."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Options()
    parser.add_argument("--device", default=default.device)
    parser.add_argument("--threads", type=int, default=default.threads, help="of torch, on a CPU")
    parser.add_argument("--rounds", type=int, default=default.rounds, help="at most")
    parser.add_argument("--seconds", type=float, default=default.seconds, help="of wall clock a case")
    parser.add_argument("--budget", type=float, default=0.0, help="seconds of wall clock in all; 0: no bound")
    parser.add_argument("--quick", action="store_true", help="smallest sizes, one round: correctness only")
    parser.add_argument("--cases", nargs="+", default=(), help="parts of names of cases; all if not given")
    parser.add_argument("--skip", nargs="+", default=(), help="contenders that are left out")
    parser.add_argument("--keep-memory", action="store_true", help="the allocator of mmsae's commands, for everybody")
    parser.add_argument("--out", type=Path, default=default.out, help="folder of results")
    given = parser.parse_args(args)
    options = Options(**{**vars(given), "cases": tuple(given.cases), "skip": tuple(given.skip)})
    torch.set_num_threads(options.threads)
    if options.keep_memory and not keep_memory():
        parser.error("--keep-memory: the allocator is not glibc's, or the environment says already what it does")
    return replace(options, rounds=1) if options.quick else options


def shared(cases: Sequence[Any], options: Options) -> Iterator[tuple[Any, Options]]:
    """Cases with the seconds that each may take of the budget; those for which nothing is left are named."""
    start, cases = time.perf_counter(), list(cases)
    for i, case in enumerate(cases):
        left = options.budget - (time.perf_counter() - start)
        if options.budget and left <= 0:
            print(f"\nno time left for: {', '.join(map(str, cases[i:]))}", flush=True)
            return
        # preparing a case takes about as long as its rounds
        yield case, replace(options, seconds=left / (len(cases) - i) / 2) if options.budget else options


@dataclass
class Timing:
    """Milliseconds of one contender in every round, what its first step agreed with, and what it kept in memory."""

    ms: list[float] = field(default_factory=list)
    inner: int = 1  #: Steps that each of the figures is the mean of.
    memory: int | None = None  #: Bytes at the worst moment of a step beside what it began with.
    note: str = ""  #: Why there are no figures, or what is special about them.
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def median(self) -> float | None:
        """Of the rounds; None without any."""
        return statistics.median(self.ms) if self.ms else None


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def paired(slow: Timing, fast: Timing) -> tuple[float, float, float] | None:
    """Quartiles of the ratios of two contenders, round by round; None where one has no figures."""
    if not slow.ms or not fast.ms:
        return None
    return quartiles([a / b for a, b in zip(slow.ms, fast.ms, strict=False)])


# ----------------------------------------------------------------------------------------------------------- clocks
def clock(options: Options) -> Callable[[Callable[[], Any], int], float]:
    """``(what, how often) -> mean milliseconds``: of the process on a CPU, between events on CUDA."""

    def on_cpu(what: Callable[[], Any], times: int) -> float:
        start = time.process_time()
        for _ in range(times):
            what()
        return 1e3 * (time.process_time() - start) / times

    def on_cuda(what: Callable[[], Any], times: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(times):
            what()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / times

    return on_cuda if options.cuda else on_cpu


def interleave(contenders: Mapping[str, Callable[[], Any]], options: Options, warm: int = 2) -> dict[str, Timing]:
    """Time every contender in interleaved rounds, within the options' number of rounds and seconds.

    A contender that raises is left out of what follows, with the reason as its note.

    Args:
        contenders: What is timed, by name.
        options: Rounds and seconds, and the device.
        warm: Runs of each before the first round: they compile, allocate and tune.
    """
    inner = INNER if options.cuda and not options.quick else 1
    timed, found = clock(options), {name: Timing(inner=inner) for name in contenders}
    running = dict(contenders)
    start = time.perf_counter()
    for name, what in list(running.items()):
        for _ in range(min(warm, 1) if options.quick else warm):
            if not _attempt(what, found[name]):
                del running[name]
                break
    warming, start = time.perf_counter() - start, time.perf_counter()
    for i in range(options.rounds):
        names = list(running)
        for name in names[i % len(names) :] + names[: i % len(names)] if names else []:
            ms = _attempt(lambda what=running[name]: timed(what, inner), found[name])
            if ms is None:
                del running[name]
            else:
                found[name].ms.append(ms)
        done, spent = i + 1, time.perf_counter() - start
        if done >= 3 and spent + warming + spent / done > options.seconds:
            break
    return found


def _attempt(what: Callable[[], Any], timing: Timing) -> Any:
    """What a contender returns (True for nothing), or None where it raises, with the reason as its note."""
    try:
        value = what()
    except Exception as error:  # another library may raise anything; mmsae's own failures fail the benchmark
        timing.note, timing.ms = f"failed: {first_line(error)}", []
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None
    return True if value is None else value


def first_line(error: BaseException) -> str:
    """What an exception says, in one line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"


# ----------------------------------------------------------------------------------------------------------- memory
def peak_memory(what: Callable[[], Any], options: Options) -> int:
    """Bytes that torch holds at the worst moment of a run, beside what it holds before.

    On a CPU they are summed from every allocation that torch reports, since what the process holds depends on what
    the allocator kept of earlier contenders.
    """
    what()
    gc.collect()
    if options.cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        what()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        what()
    events = [e for e in watched.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


# ----------------------------------------------------------------------------------------------------------- floors
@contextmanager
def product_precision(precision: str) -> Iterator[None]:
    """Products of float32 matrices in ``fp32`` or ``tf32``; what it was is restored."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def products(x: Tensor, weight: Tensor, options: Options) -> dict[str, Callable[[], Any]]:
    """The one dense product that no exact step avoids, ``x @ weight.T``, in every precision of the device."""
    half = x.bfloat16(), weight.bfloat16()

    def plain(a: Tensor, b: Tensor, precision: str) -> Callable[[], Any]:
        def run() -> None:
            with torch.no_grad(), product_precision(precision):
                F.linear(a, b)

        return run

    if options.cuda:
        return {f"product {p}": plain(x, weight, p) for p in ("fp32", "tf32")} | {"product bf16": plain(*half, "fp32")}
    from mmsae.kernels.plain import linear, row_chunks

    def chunked() -> None:
        with torch.no_grad():
            for rows in row_chunks(len(x), len(weight), x.device):
                linear(x[rows], weight, None)

    slow, fast = plain(x, weight, "fp32"), plain(*half, "fp32")
    return {"product fp32": chunked, "product fp32, torch": slow, "product bf16": fast}


def copy_bandwidth(options: Options) -> float:
    """Bytes a second, read and written, of a copy that no cache holds."""
    size = 2**22 if options.quick else 2**30 if options.cuda else 2**28
    a = torch.empty(size // 4, device=options.device).fill_(1.0)
    b = torch.empty_like(a)
    timed = clock(options)
    b.copy_(a)
    return max(2 * size / (1e-3 * timed(lambda: b.copy_(a), 3)) for _ in range(1 if options.quick else 5))


def device_floor(d: int, d_sae: int, k: int, batch: int, product_ms: float, bandwidth: float) -> float:
    """Milliseconds that a TopK step needs at least on a GPU: its bf16 product, and the bytes of all else.

    Bytes are those of four passes over ``batch * k`` atom rows in bf16 (decoding, gradients of values and of the two
    tables), and of gradients, Adam and bf16 copies of two tables of float32 (34 a parameter).
    """
    moved = batch * k * d * 2 * 4 + 2 * d * d_sae * 34
    return product_ms + 1e3 * moved / bandwidth


# ------------------------------------------------------------------------------------------------------ what is left
def environment(options: Options) -> dict[str, Any]:
    """Date, machine, versions and settings that figures depend on."""
    names = ("torch", "triton", *PEERS.values())
    found: dict[str, Any] = {
        "date": _now(),
        "commit": _asked("git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"),
        "device": torch.cuda.get_device_name() if options.cuda else _cpu_name(),
        "python": platform.python_version(),
        "versions": {name: v for name in names if (v := _version(name))},
        "load": [round(v, 2) for v in os.getloadavg()],
        "allocator": {name: os.environ[name] for name in ALLOCATORS if name in os.environ}
        or ("keeps memory" if options.keep_memory else "the system's"),
    }
    if options.cuda:
        found |= {
            "cuda": torch.version.cuda,
            "driver": _asked("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        }
    else:
        found |= {"threads": torch.get_num_threads(), "capability": torch.backends.cpu.get_cpu_capability()}
    return found


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="minutes")


def _asked(*command: str) -> str:
    """The first line that a program prints, or why there is none."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.CalledProcessError) as error:
        return f"unknown ({first_line(error)})"


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def said(found: Mapping[str, Any]) -> str:
    """An environment in a paragraph."""
    versions = ", ".join(f"{name} {v}" for name, v in found["versions"].items())
    where = f"driver {found['driver']}" if "driver" in found else f"{found['threads']} thread, CPU time"
    allocator = f"allocator: {found['allocator']}"
    what = f"commit {found['commit']}, {found['device']}, {where}"
    return f"{found['date']}, {what}, load {found['load'][0]}, {allocator}; {versions}."


def timing_table(timings: Mapping[str, Timing], base: str, columns: Sequence[str] = ()) -> str:
    """A table of contenders: median with quartiles, how many times slower than ``base``, memory and extra columns."""
    rows = []
    for name, t in timings.items():
        if not t.ms:
            rows.append([name, None, None, None, *[t.extra.get(c) for c in columns], t.note])
            continue
        low, middle, high = quartiles(t.ms)
        over = None if name == base or base not in timings else paired(t, timings[base])
        ratio = None if over is None else f"{over[1]:.2f} ({over[0]:.2f} to {over[2]:.2f})"
        memory = None if t.memory is None else f"{t.memory / 2**20:,.0f}"
        extra = [t.extra.get(c) for c in columns]
        rows.append([name, f"{middle:.4g} ({low:.4g} to {high:.4g})", ratio, memory, *extra, t.note])
    head = ["", "ms", f"over {base}", "MiB", *columns, ""]
    return markdown_table(head, rows)


@dataclass
class Result:
    """What one benchmark leaves: ``OUT/NAME.json`` (every round), ``NAME.md`` (tables), and at the end ``NAME.png``."""

    name: str
    options: Options
    cases: dict[str, dict[str, Any]] = field(default_factory=dict)
    tables: dict[str, str] = field(default_factory=dict)

    def add(self, case: str, table: str, timings: Mapping[str, Timing] | None = None, **facts: Any) -> None:
        """Take a case in, print its table and write everything so far."""
        times = {n: asdict(t) | {"median": t.median} for n, t in (timings or {}).items()}
        when = {"date": _now(), "load": round(os.getloadavg()[0], 2)}
        self.cases[case] = when | facts | ({"timings": times} if times else {})
        self.tables[case] = table
        print(f"\n### {case}\n\n{table}", flush=True)
        self.write()

    def write(self) -> None:
        """Write figures and tables."""
        self.options.out.mkdir(parents=True, exist_ok=True)
        path = self.options.out / self.name
        found = environment(self.options)
        asked = {k: v for k, v in asdict(self.options).items() if k != "out"}
        content = {"environment": found, "options": asked, "cases": self.cases}
        write_json(path.with_suffix(".json"), content, indent=1)  # whole, should its time be over meanwhile
        text = [said(found), *(f"### {case}\n\n{table}" for case, table in self.tables.items())]
        path.with_suffix(".md").write_text("\n\n".join(text) + "\n")

    def draw(self) -> None:
        """Write the picture: medians of every case."""
        from mmsae.report.figures import PALETTE, canvas, write_png

        shown = {
            case: {n: t["median"] for n, t in facts.get("timings", {}).items() if t["median"]}
            for case, facts in self.cases.items()
        }
        shown = {case: medians for case, medians in shown.items() if medians}
        if not shown:
            return
        bars = sum(map(len, shown.values()))
        ratios = [len(m) + 1 for m in shown.values()]
        grid = {"height_ratios": ratios}
        with canvas(1, len(shown), 7.2, 0.22 * bars + 0.6 * len(shown), squeeze=False, gridspec_kw=grid) as (fig, axes):
            for ax, (case, medians) in zip(axes[:, 0], shown.items(), strict=True):
                colour = [PALETTE[0] if n.startswith("mmsae") else PALETTE[5] for n in medians]
                ax.barh(list(medians), list(medians.values()), color=colour)
                ax.invert_yaxis()
                ax.set_title(f"{case} (ms)", fontsize=9)
                ax.tick_params(labelsize=7)
            write_png(fig, self.options.out / f"{self.name}.png")
