"""Forgetting a concept in a diffusion model: SAeUron's recipe (arXiv 2501.18052) as a list of interventions.

Statistics of concepts -> latents whose share of the concept's code stands out at each step ->
where such a latent is above its usual value, it is multiplied by a negative number, on all positions and both guidance
branches, step by step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmsae.files import atomic_file
from mmsae.hosts.sites import COND, Where
from mmsae.metrics.choice import warn_at_edge
from mmsae.sae import SAE
from mmsae.steering.edits.edit import Edit
from mmsae.steering.edits.intervention import Intervention
from mmsae.steering.measure.images import Unlearning
from mmsae.types import InputError


class ConceptStats(NamedTuple):
    """Mean codes while concepts are drawn."""

    mean: Tensor  #: ``(C, S, F)`` over prompts and positions, of each concept at each step.
    prompts: Tensor  #: ``(C,)`` number of prompts of each.
    concepts: tuple[str, ...]  #: The ``C`` names.
    steps: int  #: Steps of the generation, S.

    def index(self, concept: str) -> int:
        """Row of a concept."""
        if concept not in self.concepts:
            raise InputError(f"no statistics of concept {concept!r}: there are {', '.join(self.concepts)}.")
        return self.concepts.index(concept)

    def split(self, concept: str) -> tuple[Tensor, Tensor]:
        """``(S, F)`` mean code of the concept, and of all prompts of the other concepts pooled."""
        if len(self.concepts) < 2:
            raise InputError("a concept stands out among others only: statistics of one concept have no background.")
        c = self.index(concept)
        weight = self.prompts.to(self.mean).clone()
        weight[c] = 0
        return self.mean[c], torch.einsum("c,csf->sf", weight / weight.sum(), self.mean)

    @property
    def threshold(self) -> Tensor:
        """``(S, F)`` mean over concepts of the mean activation: above it a latent counts as on."""
        return self.mean.mean(0)

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file."""
        about = {"concepts": "\n".join(self.concepts), "steps": str(self.steps)}
        with atomic_file(path) as temp:
            save_file({"mean": self.mean.contiguous().cpu(), "prompts": self.prompts.cpu()}, temp, about)
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> ConceptStats:
        """Read what :meth:`save` wrote."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as f:
                about = f.metadata() or {}
            tensors = load_file(path)
            return cls(tensors["mean"], tensors["prompts"], tuple(about["concepts"].split("\n")), int(about["steps"]))
        except (OSError, KeyError, SafetensorError) as e:
            raise InputError(f"{path} does not hold statistics of concepts: {e}.") from e


@torch.no_grad()
def concept_stats(
    host: Any,
    sae: Any,
    site: Any,
    prompts: Mapping[str, Sequence[str]],
    *,
    modality: str | None = None,
    steps: int = 20,
    seed: int = 0,
    batch_size: int = 16,
    progress: bool = False,
    **options: Any,
) -> ConceptStats:
    """Draw prompts of every concept and average the codes at a site, step by step.

    Args:
        host: Diffusion host.
        sae: SAE of the site.
        site: The site.
        prompts: ``{concept: its anchor prompts}``; as many of each as of the others is best.
        modality: Modality of the codes; default: the SAE's only one.
        steps: Steps of the generation.
        seed: Prompt ``i`` of every concept is drawn with seed ``seed + i``, so that concepts differ in words only.
        batch_size: Prompts at a time.
        progress: Whether to show a bar.
        **options: Options of ``host.generate``.

    Returns:
        Codes averaged over positions and prompts (and over the evaluations of a step, where a scheduler has several).

    Raises:
        InputError: A concept without prompts.
    """
    from tqdm import tqdm

    if empty := [c for c, p in prompts.items() if not p]:
        raise InputError(f"concept {empty[0]!r} has no prompts.")
    total = torch.zeros(len(prompts), steps, sae.d_sae)
    seen = torch.zeros(len(prompts), steps)
    jobs = [(c, i, text) for c, texts in enumerate(prompts.values()) for i, text in enumerate(texts)]
    bar = tqdm(total=len(jobs), desc="statistics", disable=not progress, unit="image")
    for at in range(0, len(jobs), batch_size):
        concept, number, texts = zip(*jobs[at : at + batch_size], strict=True)
        which = torch.tensor(concept)

        def record(rows: Tensor, where: Where, which: Tensor = which) -> Tensor:
            keep = slice(None) if where.branch is None else where.branch == COND
            item = where.item[keep]
            means = sae.encode(rows[keep], modality).pool(item, len(which)).cpu()
            step = where.step or 0
            total[:, step].index_add_(0, which, means)
            seen[:, step].index_add_(0, which, torch.ones(len(which)))
            return rows

        with host.edit(site, record, where=True):
            host.generate(list(texts), steps=steps, seed=[seed + i for i in number], batch_size=len(texts), **options)
        bar.update(len(texts))
    bar.close()
    counts = torch.tensor([len(p) for p in prompts.values()])
    return ConceptStats(total / seen.clamp(min=1)[..., None], counts, tuple(prompts), steps)


def selection_score(target: Tensor, others: Tensor) -> Tensor:
    """``s_i = m_c,i / sum m_c - m_o,i / sum m_o``: how much more of a concept's code lies on a latent.

    ``target`` and ``others`` are mean codes ``(..., F)``. The score sums to 0 over F; it is all 0 where either code is
    empty, for there is nothing to compare.

    Raises:
        InputError: Codes with signs, which are no shares of a whole.
    """
    a, b = target.double(), others.double()
    if (a < 0).any() or (b < 0).any():
        raise InputError("features are chosen by their share in a concept's code, which codes with signs have not")
    total_a, total_b = a.sum(-1, keepdim=True), b.sum(-1, keepdim=True)
    score = a / total_a.clamp(min=1e-30) - b / total_b.clamp(min=1e-30)
    return torch.where((total_a > 0) & (total_b > 0), score, 0)


def above_percentile(score: Tensor, percentile: float) -> Tensor:
    """Ids of the latents whose score ``(F,)`` is over a percentile of all, the highest first.

    Of 20,480 latents, 99.99, 99.995 and 99.999 are 3, 2 and 1.

    Raises:
        InputError: A percentile outside (0, 100).
    """
    if not 0 < percentile < 100:
        raise InputError(f"percentile {percentile} is not between 0 and 100.")
    over = (score > torch.quantile(score, percentile / 100)).nonzero().flatten()
    return over[score[over].argsort(descending=True)]


PERCENTILES = (99.99, 99.995, 99.999)
GAMMAS = (-1.0, -5.0, -10.0, -15.0, -20.0, -25.0, -30.0)


def forget(
    stats: ConceptStats, concepts: str | Sequence[str], percentile: float = 99.995, gamma: float = -5.0
) -> list[Edit]:
    """One edit per step: ``z_i' = gamma mu_c,i,t z_i`` where ``z_i`` is above the mean over concepts at (i, t).

    The factor holds the concept's own mean activation, so that the edit is quadratic in the latent's scale, as
    published. Several concepts: the union of their latents; where two claim one, the later concept's factor holds.

    Args:
        stats: Statistics of a generation with as many steps as the one that will be steered.
        concepts: What to forget.
        percentile: Percentile of selection scores; latents above it are taken.
        gamma: Negative factor.
    """
    chosen: list[dict[int, float]] = [{} for _ in range(stats.steps)]
    for name in [concepts] if isinstance(concepts, str) else concepts:
        target, others = stats.split(name)
        for step, score in enumerate(selection_score(target, others)):
            ids = above_percentile(score, percentile)
            chosen[step] |= dict(zip(ids.tolist(), (gamma * target[step, ids]).tolist(), strict=True))
    return [
        Edit.cond_scale(list(own), list(own.values()), stats.threshold[step, list(own)]) if own else Edit()
        for step, own in enumerate(chosen)
    ]


def at_steps(site: Any, sae: SAE, edits: Sequence[Edit], **gates: Any) -> list[tuple[Any, tuple[SAE, Intervention]]]:
    """Edits of step 0, 1, ... as what ``attach`` takes; empty ones are left out.

    ``gates`` are other fields of the interventions; default: both guidance branches.
    """
    gates = {"branch": "all", "unit": "raw", **gates}
    return [(site, (sae, Intervention(e, steps=(t, t + 1), **gates))) for t, e in enumerate(edits) if e.ops]


class Setting(NamedTuple):
    """One setting of :func:`forget`, and what it did."""

    percentile: float  #: Percentile of scores.
    gamma: float  #: Factor.
    result: Unlearning  #: What was measured on the tuning seed.


def tune(
    stats: ConceptStats,
    concepts: str | Sequence[str],
    measure: Callable[[list[Edit]], Unlearning],
    percentiles: Iterable[float] = PERCENTILES,
    gammas: Iterable[float] = GAMMAS,
) -> list[Setting]:
    """All settings, the best ``(UA + IRA) / 2`` first, among equals the one with the gentlest gamma.

    ``measure`` draws with edits, on a tuning seed, and judges; report the best on other seeds. The other arguments are
    those of :func:`forget`.

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
