"""What was to be reached, and whether a folder of results reached it: a table from the JSON of the other benchmarks.

    python -m benchmarks.goals runs/benchmarks

A goal is a ratio, so that it means the same on another machine: the median over rounds of paired ratios, with the
fastest of the contenders that it names. On a CPU mmsae is its default, on a GPU the fastest of its precisions and
backends that agree with the formula.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from mmsae.report.tables import markdown_table

THE_REST = ("overcomplete", "dictionary-learning", "sae-lens", "sae-lens, sparse")
PEERS = ("sparsify", *THE_REST)
DENSE = ("dense", "dense, bf16 autocast")
A, B = "512/8192/32/2048", "768/16384/32/1024"
LARGE = "1024/32768/32/16384"
# ms of a step in a trial of 150 lines of Triton on an H200, torch 2.11, Triton 3.6
TRIAL = {
    "512/4096/32/4096": 0.70,
    "768/6144/32/4096": 0.56,
    "768/6144/256/2048": 0.97,
    "1024/32768/32/4096": 1.34,
    LARGE: 3.56,
    "1024/131072/64/8192": 6.99,
}


@dataclass(frozen=True)
class Goal:
    """How many times slower the fastest of ``others`` has to be than mmsae, at least; or, with ``below``, at most."""

    what: str
    file: str
    case: str
    others: tuple[str, ...]
    goal: float
    stretch: float | None = None
    below: bool = False  #: mmsae's time over the other's, which should be small.

    def figure(self, cases: dict[str, Any], cuda: bool) -> tuple[float, str, str] | None:
        """The ratio and between whom it is; None where the case or all of the others were not run."""
        timings = cases.get(self.case, {}).get("timings", {})
        mine = fastest(timings, ours(timings) if cuda else [n for n in ours(timings) if n == "mmsae"])
        other = fastest(timings, self.others)
        if mine is None or other is None:
            return None
        floor = len(timings[other]["ms"]) == 1  # computed, not run
        times = [timings[other]["median"]] * len(timings[mine]["ms"]) if floor else timings[other]["ms"]
        over = median(a / b for a, b in zip(times, timings[mine]["ms"], strict=False))
        named = other if agrees(timings[other]) else f"{other}, which disagrees with the formula"
        return 1 / over if self.below else over, mine, named

    def said(self, bound: float | None) -> str | None:
        """A bound in words."""
        return None if bound is None else f"{'at most' if self.below else 'at least'} {bound:g}"

    def reached(self, figure: float, bound: float) -> bool:
        """Whether a figure is as good."""
        return figure <= bound if self.below else figure >= bound


def fastest(timings: dict[str, Any], names: Sequence[str]) -> str | None:
    """The contender of least median among those that have figures."""
    known = [n for n in names if n in timings and timings[n]["median"]]
    return min(known, key=lambda n: timings[n]["median"], default=None)


def ours(timings: dict[str, Any]) -> list[str]:
    """The contenders of mmsae that agree with the formula."""
    return [n for n in timings if n.startswith("mmsae") and agrees(timings[n])]


def agrees(timing: dict[str, Any]) -> bool:
    """Whether a contender agrees with the formula; what is none is a floor."""
    return timing["extra"].get("agrees", True)


def on_cpu() -> list[Goal]:
    """Those of a CPU."""
    found = []
    for size in (A, B):
        step = f"TopK step, {size}"
        found += [
            Goal(f"{step}, over sparsify", "train_step", f"topk {size}", ("sparsify",), 2.5),
            Goal(f"{step}, over the rest", "train_step", f"topk {size}", THE_REST, 6, 8),
            Goal(f"{step}, times its product", "train_step", f"topk {size}", ("product fp32",), 2.2, 1.6, below=True),
        ]
    auxk, batch = f"topk_auxk {A}", f"batch_topk {A}"
    found += [
        Goal("AuxK, 10 % dead, over sparsify", "train_step", auxk, ("sparsify",), 2),
        Goal("AuxK, 10 % dead, over the rest", "train_step", auxk, THE_REST, 5),
        Goal("BatchTopK step, over the best peer", "train_step", batch, PEERS, 7),
        Goal("VL-SAE step, over the published form", "train_step", "vl_sae 512/4096/256/512", ("dense",), 3, 4),
    ]
    for size in (A, B):
        both = f"encode, decode {size}"
        found += [
            Goal(f"{both}, over sparsify", "inference", both, ("sparsify",), 2, 2.5),
            Goal(f"{both}, over the rest", "inference", both, THE_REST, 4, 5),
        ]
    pursuit = "mp 512/4096/32/512"
    return [*found, Goal("MP codes, over overcomplete", "pursuit", pursuit, ("overcomplete",), 10, 30)]


def on_cuda() -> list[Goal]:
    """Those of a GPU."""
    found = [
        Goal(f"TopK step, {size}, over the fastest other", "train_step", f"topk {size}", (*PEERS, *DENSE), 1)
        for size in TRIAL
    ]
    large, floor = f"topk {LARGE}", ("floor: product bf16 and bytes",)
    found += [
        Goal(f"TopK step, {LARGE}, over sparsify", "train_step", large, ("sparsify",), 1),
        Goal(f"TopK step, {LARGE}, over dense bf16", "train_step", large, DENSE[1:], 2.5, 3.5),
        Goal(f"TopK step, {LARGE}, share of the floor", "train_step", large, floor, 0.55, 0.7),
    ]
    for method in ("topk_auxk", "batch_topk", "paired_topk", "vl_sae"):
        sizes = ("512/4096/256/512",) if method == "vl_sae" else ("768/6144/32/4096", LARGE)
        found += [
            Goal(f"{method} {s}, over the fastest other", "train_step", f"{method} {s}", (*PEERS, *DENSE), 1)
            for s in sizes
        ]
    return found


def storage(rates: dict[str, float]) -> list[tuple[str, str, str, bool]]:
    """What is asked of the loader: ``(what, figure, goal, reached)``."""
    shuffled = rates["mmsae, shuffled"]
    step, tar = (next(r for n, r in rates.items() if n.startswith(part)) for part in ("step", "tar"))
    return [
        ("shuffled loader, over the step's need", f"{shuffled / step:.1f}", "at least 20", shuffled >= 20 * step),
        ("shuffled loader, over a tar of npy", f"{shuffled / tar:.1f}", "at least 50", shuffled >= 50 * tar),
    ]


def table(*folders: Path) -> str:
    """Goals and figures of the results in folders; of a case that several have, the last."""
    cases: dict[str, Any] = {}
    device: dict[str, Any] = {}
    for path in (p for folder in folders for p in sorted(folder.glob("*.json"))):
        content = json.loads(path.read_text())
        cases.setdefault(path.stem, {}).update(content["cases"])
        device = content["environment"]
    cuda = "cuda" in device
    rows: list[list[Any]] = []
    for goal in on_cuda() if cuda else on_cpu():
        found = goal.figure(cases.get(goal.file, {}), cuda)
        bounds = [goal.said(goal.goal), goal.said(goal.stretch)]
        if found is None:
            rows.append([goal.what, None, *bounds, "not run"])
            continue
        figure, mine, other = found
        best = goal.stretch if goal.stretch and goal.reached(figure, goal.stretch) else goal.goal
        verdict = ("stretch reached" if best == goal.stretch else "reached") if goal.reached(figure, best) else "missed"
        rows.append([goal.what, f"{figure:.2f} ({mine}; {other})", *bounds, verdict])
    if "H200" in device.get("device", ""):
        for size, bound in TRIAL.items():
            timings = cases.get("train_step", {}).get(f"topk {size}", {}).get("timings", {})
            if mine := fastest(timings, ours(timings)):
                ms = timings[mine]["median"]
                verdict = "reached" if ms <= bound else "missed"
                rows.append([f"TopK step, {size}, ms", f"{ms:.2f} ({mine})", f"at most {bound:g}", None, verdict])
    for facts in cases.get("storage", {}).values():
        rows += [[*row, None, "reached" if good else "missed"] for *row, good in storage(facts["pairs_per_second"])]
    return markdown_table(["", "figure", "goal", "stretch", ""], rows)


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="of one device; goals.md is written into the last")
    folders = parser.parse_args(args).folders
    text = table(*folders)
    (folders[-1] / "goals.md").write_text(text + "\n")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
