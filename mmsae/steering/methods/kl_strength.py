"""The unit ``kl``: the strength whose mean next-token divergence hits a target.

Search as in public steering code (spec 3.4, after EleutherAI/delphi, arXiv 2410.13928): log strength is bracketed,
interpolated on log divergence, and a search that does not get there says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple


class KLSearch(NamedTuple):
    """What a search found."""

    strength: float  #: The closest strength that was tried.
    kl: float  #: Divergence at it, nats.
    target: float  #: What was wanted.
    converged: bool  #: Whether ``kl`` is within the tolerance of ``target``.
    tried: tuple[tuple[float, float], ...]  #: ``(strength, kl)`` of every evaluation, in order.


def search_kl(
    measure: Callable[[float], float],
    target: float = 0.33,
    start: float = 1e2,
    low: float = 1e-3,
    high: float = 1e4,
    tolerance: float = 0.1,
    evaluations: int = 20,
) -> KLSearch:
    """Find the strength at which ``measure(strength)``, a divergence that grows with the strength, is ``target`` nats.

    Starts at ``start``; bisects log strength in ``[low, high]`` until two evaluations enclose the target, from then on
    interpolates log strength on log divergence. Stops within a relative error of ``tolerance``, or after as many
    ``evaluations``, and then reports that it has not converged.
    """
    ends = [math.log(low), math.log(high)]
    known: list[float | None] = [None, None]  # log divergence at the ends, once measured there
    tried: list[tuple[float, float]] = []
    at, goal = math.log(start), math.log(target)
    while len(tried) < evaluations:
        kl = float(measure(math.exp(at)))
        tried.append((math.exp(at), kl))
        if abs(kl - target) <= tolerance * target:
            break
        side = 0 if kl < target else 1  # NaN counts as too strong
        ends[side], known[side] = at, math.log(kl) if 0 < kl < math.inf else None
        a, b = ends
        if b - a < 1e-9:
            break
        at = (a + b) / 2
        if None not in known and known[1] > known[0]:
            share = (goal - known[0]) / (known[1] - known[0])
            # an interpolation that keeps one end moves slowly where the curve bends: stay off the ends
            at = a + min(max(share, 0.02), 0.98) * (b - a)
    best = min(tried, key=lambda t: abs(math.log(t[1]) - goal) if 0 < t[1] < math.inf else math.inf)
    return KLSearch(*best, target, abs(best[1] - target) <= tolerance * target, tuple(tried))
