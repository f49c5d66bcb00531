"""Does a classifier on codes lose less under a shift of the data than one on raw features?

The SAE and the probes see source images only; targets are only scored. The protocol follows the question of Olson et
al. (arXiv 2508.11277), whose own could not be read; effective robustness is that of Taori et al. (arXiv 2007.00644):
target accuracy minus what a line through raw-feature probes, in logits of accuracies, predicts from source accuracy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmsae.evaluation.features import Features
from mmsae.evaluation.options import KINDS
from mmsae.evaluation.rows import row
from mmsae.evaluation.spaces import CONTROLS, Space, spaces
from mmsae.metrics.choice import at_edge
from mmsae.metrics.concepts.probing import (
    L2,
    Probe,
    choose_l2,
    logistic,
    matrix,
    most_different,
    nearest_mean,
    predictions,
)
from mmsae.metrics.statistics import paired_interval, wilson
from mmsae.sae import SAE
from mmsae.types import InputError

SPARSE = (1, 5, 20, 100)
FRACTIONS = (0.02, 0.05, 0.1, 0.25, 0.5)  # of the source rows: probes of lower source accuracy


class ShiftPoint(NamedTuple):
    """One probe: accuracy on source and targets."""

    probe: str  #: Name
    source: float  #: Accuracy on source images that were not trained on
    target: dict[str, float]  #: ``{set: accuracy}``
    right: dict[str, Tensor]  #: ``{set: (n,) bool}`` hits, source under an empty name
    l2: float | None = None  #: Chosen strength, or None


def logit(p: float, n: int) -> float:
    """Log odds of a share of n, kept half a count away from 0 and 1."""
    p = min(max(p, 0.5 / n), 1 - 0.5 / n)
    return math.log(p / (1 - p))


def robustness_line(points: Sequence[tuple[float, float]], n: tuple[int, int]) -> tuple[float, float]:
    """``(slope, intercept)`` by least squares of logit target over logit source accuracy.

    ``points`` are ``(source, target)`` accuracies, ``n`` the numbers of source and of target images.
    """
    x, y = (np.array([logit(p[i], n[i]) for p in points]) for i in (0, 1))
    if len(points) < 2 or np.ptp(x) < 1e-9:
        return 0.0, float(y.mean())
    slope, intercept = np.polyfit(x, y, 1)
    return float(slope), float(intercept)


def effective_robustness(source: float, target: float, line: tuple[float, float], n_source: int) -> float:
    """Target accuracy minus what the line predicts from source accuracy."""
    return target - 1 / (1 + math.exp(-(line[0] * logit(source, n_source) + line[1])))


def at_source(points: Sequence[tuple[float, float]], source: float) -> float:
    """Target accuracy at a source accuracy, linear between the probes of one space; NaN outside their range."""
    best: dict[float, list[float]] = {}
    for s, t in points:
        best.setdefault(s, []).append(t)
    xs = sorted(best)
    if not xs[0] <= source <= xs[-1]:
        return math.nan
    return float(np.interp(source, xs, [float(np.mean(best[s])) for s in xs]))


def few(grid: Sequence[float]) -> Sequence[float]:
    """Every other L2 strength: what sparse probes, which depend on it little, are chosen from."""
    return grid[1::2]


def probe_space(
    space: Space,
    y: Sequence[Tensor],
    names: Sequence[str],
    classes: int,
    sparse: Sequence[int] = SPARSE,
    grid: Sequence[float] = L2,
    seed: int = 0,
) -> tuple[list[ShiftPoint], list[tuple[float, dict[str, float]]]]:
    """All probes of one space, whose sets are train, validation, source test and targets, with labels ``y``.

    L2 strengths are chosen on the validation set; sparse probes of more features than there are are left out.

    Returns:
        The probes, and ``(source, {target: accuracy})`` of all linear probes that were fitted: every L2 strength and
        every fraction of the training set.
    """
    (x, val, *tests), (labels, y_val, *truths) = [matrix(s) for s in space.sets], [v.numpy() for v in y]

    def point(name: str, probe: Probe, l2: float | None = None) -> ShiftPoint:
        right = [torch.from_numpy(predictions(probe, t).numpy() == own) for t, own in zip(tests, truths, strict=True)]
        share = [r.double().mean().item() for r in right]
        target = dict(zip(names, share[1:], strict=True))
        return ShiftPoint(name, share[0], target, dict(zip(("", *names), right, strict=True)), l2)

    fits = [(l2, logistic(x, labels, classes, l2)) for l2 in sorted(grid, reverse=True)]
    best = max(fits, key=lambda f: ((predictions(f[1], val).numpy() == y_val).mean(), f[0]))
    points = [point("linear", best[1], best[0]), point("nearest mean", nearest_mean(x, labels, classes))]
    order = most_different(x, labels, classes, max(sparse, default=0))
    for n in sparse:
        if n <= x.shape[1]:
            probe, l2 = choose_l2(x, labels, (val, y_val), classes, few(grid), order[:n])
            points.append(point(f"{n}-sparse", probe, l2))
    path = [point("", p) for _, p in fits]
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    for part in FRACTIONS:
        rows = shuffled[: max(2, int(part * len(labels)))]
        if len(np.unique(labels[rows])) > 1:
            path.append(point("", logistic(x[rows], labels[rows], classes, best[0])))
    return points, [(p.source, p.target) for p in path]


def generalisation(
    sae: SAE,
    train: Features,
    val: Features,
    source: Features,
    targets: Mapping[str, Features],
    kinds: Sequence[str] = KINDS,
    controls: Sequence[str] = CONTROLS,
    sparse: Sequence[int] = SPARSE,
    grid: Sequence[float] = L2,
    seed: int = 0,
) -> dict[str, Any]:
    """Probes trained on source images, scored on held-out source images and on targets.

    The SAE was trained on unlabelled source images. L2 strengths are chosen on ``val``; ``targets`` are ``{name:
    images}`` of the same classes, numbered alike. Images without label are left out everywhere.

    Returns:
        ``rows`` (:func:`mmsae.evaluation.rows.row`): per probe and features ``NAME source``, ``NAME target`` (its
        accuracy), ``NAME gain`` (minus that of raw features, over the same images), ``NAME effective robustness``, and
        for linear probes ``matched gain`` (at the highest source accuracy that the features and raw ones reach);
        ``lines``, ``spaces``, and ``edges``: chosen L2 strengths that are an end of their grid
        (:mod:`mmsae.metrics.choice`).

    Raises:
        InputError: Fewer than two classes, or a target that shares none of them.
    """
    sets = [_labelled(f, what) for f, what in ((train, "training"), (val, "validation"), (source, "source"))]
    sets += [_labelled(f, f"target {name}") for name, f in targets.items()]
    classes = int(max(f.labels.max() for f in sets)) + 1
    if len(sets[0].labels.unique()) < 2:
        raise InputError(f"generalisation needs two classes, the training images have {len(sets[0].labels.unique())}")
    for name, f in zip(targets, sets[3:], strict=True):
        if not set(f.labels.unique().tolist()) & set(sets[0].labels.unique().tolist()):
            raise InputError(f"target {name} shares no class with the {classes} of the training images")
    every = spaces(sets, sae, kinds, controls, seed)
    y, names = [f.labels for f in sets], list(targets)
    found = {s.name: (s, *probe_space(s, y, names, classes, sparse, grid, seed)) for s in every}
    n = {name: f.n for name, f in zip(("", *names), sets[2:], strict=True)}
    rows, edges, lines = [], [], {}
    raw_points, raw_path = found["raw"][1:] if "raw" in found else ([], [])
    for name in names:
        if raw_path:
            cloud = [(s, t[name]) for s, t in raw_path] + [(p.source, p.target[name]) for p in raw_points]
            lines[name] = robustness_line(cloud, (n[""], n[name]))
    reference = {p.probe: p for p in raw_points}
    for space, points, path in found.values():
        about = {"features": space.features, "control": space.control}
        for p in points:
            rows += _rows_of(p, reference.get(p.probe), lines, n, about, seed)
            if p.l2 is not None:
                tried = grid if p.probe == "linear" else few(grid)
                edges += at_edge(f"l2 of {p.probe} on {space.name}", p.l2, tried)
        if raw_path and path is not raw_path:
            rows += [_matched(path, raw_path, name, n[name], about) for name in names]
    scatter = {
        k: {"path": path, "points": [(p.probe, p.source, p.target) for p in pts]} for k, (_, pts, path) in found.items()
    }
    return {"rows": rows, "lines": lines, "spaces": scatter, "classes": classes, "edges": edges}


def _labelled(f: Features, what: str) -> Features:
    f = f.rows(f.labels >= 0)
    if not f.n:
        raise InputError(f"none of the {what} images has a class that was asked for")
    return f


def _matched(
    path: Sequence[tuple[float, dict[str, float]]],
    raw: Sequence[tuple[float, dict[str, float]]],
    name: str,
    n: int,
    about: Mapping[str, str],
) -> dict[str, Any]:
    """Target accuracy minus that of raw features, both at the highest source accuracy that both reach."""
    at = min(max(s for s, _ in p) for p in (path, raw))
    own, other = (at_source([(s, t[name]) for s, t in p], at) for p in (path, raw))
    more = {"source": at, "target": None if math.isnan(own) else own, **about}
    return row("generalisation", name, "matched gain", value=own - other, n=n, **more)


def _rows_of(
    p: ShiftPoint,
    raw: ShiftPoint | None,
    lines: Mapping[str, tuple[float, float]],
    n: Mapping[str, int],
    about: Mapping[str, str],
    seed: int,
) -> list[dict[str, Any]]:
    def share(name: str, score: str, value: float) -> dict[str, Any]:
        ends = wilson(value * n[name], n[name])
        return row("generalisation", name or "source", score, value=value, n=n[name], interval=ends, l2=p.l2, **about)

    out = [share("", f"{p.probe} accuracy", p.source)]
    for name, value in p.target.items():
        out.append(share(name, f"{p.probe} accuracy", value))
        if name in lines:
            er = effective_robustness(p.source, value, lines[name], n[""])
            out.append(row("generalisation", name, f"{p.probe} effective robustness", value=er, n=n[name], **about))
        if raw is not None and raw is not p:
            ends, gain = paired_interval(p.right[name], raw.right[name], seed=seed), value - raw.target[name]
            out.append(row("generalisation", name, f"{p.probe} gain", value=gain, n=n[name], interval=ends, **about))
    return out
