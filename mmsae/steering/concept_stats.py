"""Mean codes of an SAE per concept and step while a diffusion model draws, and which latents stand out.

The statistics of SAeUron (arXiv 2501.18052): conditional half only, averaged over positions and prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmsae.backbones.where import COND, Where
from mmsae.files import atomic_file
from mmsae.types import InputError


class ConceptStats(NamedTuple):
    """Mean codes while concepts are drawn.

    Attributes:
        mean: ``(C, S, F)`` over prompts and positions, of each concept at each step.
        prompts: ``(C,)`` number of prompts of each.
        concepts: The ``C`` names.
        steps: Steps of the generation, S.
    """

    mean: Tensor
    prompts: Tensor
    concepts: tuple[str, ...]
    steps: int

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
        """Read what :meth:`save` wrote.

        Raises:
            InputError: Not such a file.
        """
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
        sae: Trained at ``site``.
        site: Where.
        prompts: ``{concept: its anchor prompts}``; as many of each as of the others is best.
        modality: Of the SAE; default: its only one.
        steps: Steps of the generation.
        seed: Prompt ``i`` of every concept is drawn with seed ``seed + i``, so that concepts differ in words only.
        batch_size: Prompts at a time.
        progress: Whether to show a bar.
        **options: Of ``host.generate``.

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
    bar = tqdm(total=len(jobs), desc="statistics", disable=not progress, unit="picture")
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

    Args:
        target: ``(..., F)`` mean code of the concept.
        others: ``(..., F)`` of the others.

    Returns:
        ``(..., F)``, sums to 0 over F; all 0 where either code is empty, for there is nothing to compare.
    """
    a, b = target.double(), others.double()
    total_a, total_b = a.sum(-1, keepdim=True), b.sum(-1, keepdim=True)
    score = a / total_a.clamp(min=1e-30) - b / total_b.clamp(min=1e-30)
    return torch.where((total_a > 0) & (total_b > 0), score, 0)


def above_percentile(score: Tensor, percentile: float) -> Tensor:
    """Ids of the latents whose score is over a percentile of all, the highest first.

    Args:
        score: ``(F,)``.
        percentile: Of 100; 99.99, 99.995 and 99.999 are 3, 2 and 1 latents of 20,480.

    Raises:
        InputError: A percentile outside (0, 100).
    """
    if not 0 < percentile < 100:
        raise InputError(f"percentile {percentile} is not between 0 and 100.")
    over = (score > torch.quantile(score, percentile / 100)).nonzero().flatten()
    return over[score[over].argsort(descending=True)]
