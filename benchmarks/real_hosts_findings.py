"""What a reader should take home from the tables of ``real_hosts.py``, in sentences made from the tables alone.

Two figures differ where the ranges of their seeds and intervals do not overlap; else they are *not told apart*.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

LESS = ("fvu", "absorption", "full absorption", "dead share", "LCH height")  # scores of which less is better
DETECTED = "far"  # the mean of the OOD sets


class Value(NamedTuple):
    """A figure over seeds."""

    mean: float  #: Over seeds
    low: float  #: Of the seeds and their intervals
    high: float  #: Likewise

    def __str__(self) -> str:
        return f"{self.mean:.3f}".replace("0.", ".", 1)


Figures = Mapping[tuple[str, str, str], Value]  # (set, score, column)
_CELL = re.compile(r"(-?[\d.]+) \((-?[\d.]+)–(-?[\d.]+)\)")


def read_tables(text: str) -> dict[tuple[str, str, str], Value]:
    """The figures in the Markdown tables of one case."""
    found, columns = {}, []
    for line in text.splitlines():
        cells = [c.strip() for c in line.strip().strip("|").split("|")] if line.startswith("|") else []
        if cells[:2] == ["set", "score"]:
            columns = cells
        elif columns and len(cells) == len(columns):
            for column, cell in zip(columns[2:], cells[2:], strict=True):
                if match := _CELL.fullmatch(cell):
                    found[cells[0], cells[1], column] = Value(*map(float, match.groups()))
    return found


def compared(a: Value, b: Value, less: bool = False) -> str:
    """``better than``, ``worse than`` or ``not told apart from``."""
    if a.low <= b.high and b.low <= a.high:
        return "not told apart from"
    return "better than" if (a.mean < b.mean) == less else "worse than"


def listed(names: Sequence[str]) -> str:
    """``a, b and c``."""
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _beside(own: Value, others: Sequence[tuple[str, Value]], less: bool = False) -> str:
    """``better than A (.1) and B (.2), not told apart from C (.3)``."""
    by: dict[str, list[str]] = {}
    for name, value in others:
        by.setdefault(compared(own, value, less), []).append(f"{name} ({value})")
    return ", ".join(f"{verdict} {listed(names)}" for verdict, names in by.items())


def _score(f: Figures, score: str, said: str, whom: Sequence[tuple[str, str]], first: str) -> str:
    """What a score is, and beside what; empty where the case has no such score."""
    at = {c: v for (_, s, c), v in f.items() if s == score}
    if first not in at:
        return ""
    return f"{said} {at[first]}, {_beside(at[first], [(n, at[c]) for c, n in whom if c in at], score in LESS)}"


def best(f: Figures, columns: Sequence[str]) -> tuple[str, str, Value] | None:
    """``(detector, features, AUROC)`` of the best mean over the OOD sets."""
    own = [(s, c, v) for (name, s, c), v in f.items() if name == DETECTED and c in columns]
    return max(own, key=lambda x: x[2].mean) if own else None


def losses(f: Figures) -> tuple[list[str], int, int]:
    """Names of the scores in which codes are worse than raw features on some set, the number of such figures, and that
    of all which both have.
    """
    lost, n = [], 0
    for (name, score, column), value in f.items():
        other = f.get((name, score, "raw"))
        if column == "code" and other is not None:
            n += 1
            lost += [score] * (compared(value, other, score in LESS) == "worse than")
    return list(dict.fromkeys(lost)), len(lost), n


def findings(f: Figures) -> list[str]:
    """Sentences about one case."""
    controls = [("code, random", "random weights"), ("raw", "raw channels"), ("raw, pca", "components")]
    pca, random = ("recon, pca", "as many principal components"), ("recon, random", "random weights")
    places = [("code, random", "random weights"), ("code, shuffled", "shuffled places")]
    lines = [
        _score(f, "MS above chance", "Monosemanticity of latents above chance:", controls, "code"),
        _score(f, "share with 5 of one class", "Share of latents whose nine strongest images have five of one class:",
               controls, "code"),
        _score(f, "Moran's I", "Patches of a latent lie together (Moran's I):", places, "code"),
        _score(f, "fvu", "Share of the variance that is missed (FVU):", [pca, random], "recon"),
        _score(f, "dead share", "Share of latents that are never on:", controls[:1], "code"),
        _score(f, "best F1 of a node", "F1 of the best latent for a node of the tree of classes:", controls, "code"),
    ]  # fmt: skip
    kinds = ("code", "recon", "resid", "codes")
    plain, sae = best(f, ["raw"]), best(f, kinds)
    if plain and sae:
        others = [("the best on raw features", plain)]
        for control, name in (("random", "through random weights"), ("pca", "through components")):
            if found := best(f, [f"{k}, {control}" for k in kinds]):
                others.append((name, found))
        beside = _beside(sae[2], [(f"{name}, {o[0]}", o[2]) for name, o in others])
        lines.append(f"Mean AUROC over the OOD sets, the best detector through the SAE ({sae[0]}): {sae[2]}, {beside}")
    lost, figures, n = losses(f)
    if n:
        where = f": {', '.join(lost)}" if lost else ""
        lines.append(f"**Where codes lose**: {figures} of {n} figures are worse than those of raw features{where}")
    return [f"{line}." for line in lines if line]
