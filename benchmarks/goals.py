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
USUAL, WIDE = "768/6144/32/4096", "1024/131072/64/8192"
# ms of a step on an H100 or H200: at most, and what would be very good
MS = {
    f"topk {LARGE}": (4.8, 3.6),
    f"topk {USUAL}": (1.0, 0.6),
    f"paired_topk {USUAL}": (2.5, 1.6),
    f"topk {WIDE}": (9.0, 7.0),
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
    large, usual = f"topk {LARGE}", f"topk {USUAL}"
    return [
        Goal(f"TopK step, {LARGE}, over sparsify", "train_step", large, ("sparsify",), 3.5),
        Goal(f"TopK step, {LARGE}, over dense bf16", "train_step", large, DENSE[1:], 3),
        Goal(
            f"TopK step, {LARGE}, share of the floor",
            "train_step",
            large,
            ("floor: product bf16 and bytes",),
            0.55,
            0.7,
        ),
        Goal(f"TopK step, {USUAL}, over dense bf16", "train_step", usual, DENSE[1:], 1),
        Goal("VL-SAE step, over the published form", "train_step", "vl_sae 512/4096/256/512", ("dense",), 5),
    ]


def bounds_on_cuda(cases: dict[str, Any]) -> list[list[Any]]:
    """Rows of the table for what is not a ratio of contenders: milliseconds, memory, and the loop around a step."""
    rows: list[list[Any]] = []
    steps = cases.get("train_step", {})

    def row(what: str, figure: float | None, named: str, most: float, best: float | None, unit: str) -> None:
        verdict = "not run" if figure is None else "reached" if figure <= most else "missed"
        verdict = "stretch reached" if figure is not None and best is not None and figure <= best else verdict
        said = None if figure is None else f"{figure:.2f} ({named})"
        rows.append([f"{what}, {unit}", said, f"at most {most:g}", best and f"at most {best:g}", verdict])

    for case, (most, best) in MS.items():
        timings = steps.get(case, {}).get("timings", {})
        mine = fastest(timings, ours(timings))
        row(f"{case} step", timings[mine]["median"] if mine else None, mine or "", most, best, "ms")
    timings = steps.get(f"topk {WIDE}", {}).get("timings", {})
    mine = fastest(timings, ours(timings))
    _, d_sae, _, batch = map(int, WIDE.split("/"))
    held = timings[mine]["memory"] / 2**30 if mine and timings[mine]["memory"] else None
    # a float32 product of the batch would be that much by itself
    row(f"topk {WIDE} step, held beside weights", held, mine or "", 4 * d_sae * batch / 2**30, None, "GiB")
    for case, facts in cases.get("fit", {}).items():
        timings = facts["timings"]
        name = fastest(timings, [n for n in timings if n.startswith("mmsae fit")])
        over = timings[name]["median"] / timings["bare step"]["median"] if name else None
        row(
            f"mmsae fit, {case}, times the bare step", over, name or "", round(1 / 0.85, 2), round(1 / 0.95, 2), "ratio"
        )
    return rows


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
    if cuda and any(name in device["device"] for name in ("H100", "H200")):
        rows += bounds_on_cuda(cases)
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
