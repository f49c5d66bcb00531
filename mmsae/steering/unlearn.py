"""Forgetting a concept in a diffusion model: SAeUron's recipe (arXiv 2501.18052) as a list of interventions.

Statistics of concepts (``concept_stats.py``) -> latents whose share of the concept's code stands out at each step ->
where such a latent is above its usual value, it is multiplied by a negative number, on all positions and both guidance
branches, step by step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import product
from typing import Any, NamedTuple

import torch

from mmsae.metrics.choice import warn_at_edge
from mmsae.sae import SAE
from mmsae.steering.concept_stats import ConceptStats, above_percentile, selection_score
from mmsae.steering.edit import Edit
from mmsae.steering.intervention import Intervention
from mmsae.steering.measure import Unlearning
from mmsae.types import InputError

PERCENTILES = (99.99, 99.995, 99.999)
GAMMAS = (-1.0, -5.0, -10.0, -15.0, -20.0, -25.0, -30.0)


def forget(
    stats: ConceptStats, concepts: str | Sequence[str], percentile: float = 99.995, gamma: float = -5.0
) -> list[Edit]:
    """One edit per step: ``z_i' = gamma mu_c,i,t z_i`` where ``z_i`` is above the mean over concepts at (i, t).

    The factor holds the concept's own mean activation, so that the edit is quadratic in the latent's scale, as
    published. Several concepts: the union of their latents; where two claim one, the later concept's factor holds.

    Args:
        stats: Of a generation with as many steps as the one that will be steered.
        concepts: What to forget.
        percentile: Of selection scores; latents above it are taken.
        gamma: Negative.
    """
    names = [concepts] if isinstance(concepts, str) else list(concepts)
    chosen: list[dict[int, float]] = [{} for _ in range(stats.steps)]
    for name in names:
        target, others = stats.split(name)
        for step, score in enumerate(selection_score(target, others)):
            ids = above_percentile(score, percentile)
            chosen[step] |= dict(zip(ids.tolist(), (gamma * target[step, ids]).tolist(), strict=True))
    return [
        Edit.cond_scale(list(own), list(own.values()), stats.threshold[step, list(own)]) if own else Edit()
        for step, own in enumerate(chosen)
    ]


def at_steps(site: Any, sae: SAE, edits: Sequence[Edit], **gates: Any) -> list[tuple[Any, tuple[SAE, Intervention]]]:
    """Edits of a step each as what ``attach`` takes; empty ones are left out.

    Args:
        site: Where.
        sae: Trained there.
        edits: Of step 0, 1, ...
        **gates: Of the interventions; default: both guidance branches.
    """
    gates = {"branch": "all", "unit": "raw", **gates}
    return [(site, (sae, Intervention(e, steps=(t, t + 1), **gates))) for t, e in enumerate(edits) if e.ops]


class Setting(NamedTuple):
    """One setting of :func:`forget`, and what it did.

    Attributes:
        percentile: Of scores.
        gamma: Factor.
        result: On the tuning seed.
    """

    percentile: float
    gamma: float
    result: Unlearning


def tune(
    stats: ConceptStats,
    concepts: str | Sequence[str],
    measure: Callable[[list[Edit]], Unlearning],
    percentiles: Iterable[float] = PERCENTILES,
    gammas: Iterable[float] = GAMMAS,
) -> list[Setting]:
    """All settings, the best ``(UA + IRA) / 2`` first; report the best on other seeds than ``measure`` draws with.

    Args:
        stats: See :func:`forget`.
        concepts: See :func:`forget`.
        measure: Draws with edits, on a tuning seed, and judges.
        percentiles: To try.
        gammas: To try; among equals the gentlest is first.

    Warns:
        UserWarning: The best setting is an end of what was tried.

    Raises:
        InputError: Nothing to try.
    """
    tried = [
        Setting(p, g, measure(forget(stats, concepts, p, g))) for p, g in product(percentiles, sorted(gammas, key=abs))
    ]
    if not tried:
        raise InputError("unlearning is tuned over at least one percentile and one gamma.")
    tried.sort(key=lambda s: -s.result.objective)
    warn_at_edge([s._asdict() for s in tried], tried[0]._asdict(), ("percentile", "gamma"))
    return tried


def latents(edits: Sequence[Edit]) -> dict[int, float]:
    """``{latent: share of the steps at which it is edited}``, the most frequent first."""
    count = torch.zeros(1 + max((i for e in edits for i in e.ids), default=-1))
    for e in edits:
        count[list(e.ids)] += 1
    order = count.argsort(descending=True, stable=True)
    return {int(i): (count[i] / len(edits)).item() for i in order if count[i] > 0}
