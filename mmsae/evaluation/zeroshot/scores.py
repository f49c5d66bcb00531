"""Zero-shot classification: from host embeddings, reconstructions, codes, and embeddings enhanced by codes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mmsae.evaluation.options import ALPHAS
from mmsae.metrics.pairs.retrieval import cosine_to, cosine_to_few
from mmsae.metrics.statistics import pessimistic_ranks
from mmsae.sae import SAE
from mmsae.types import IMAGE, TEXT, InputError


def pool_templates(embeddings: Tensor) -> Tensor:
    """``(C, d)`` unit class vectors from ``(C, T, d)`` template embeddings: normalise, mean, normalise.

    Without the first normalisation templates would count by their norm.
    """
    return normalize(normalize(embeddings, dim=-1).mean(1), dim=-1)


@torch.no_grad()
def class_embeddings(
    embed: Callable[[list[str]], Tensor], classes: Sequence[str], templates: Sequence[str], batch_size: int = 1024
) -> Tensor:
    """``(C, d)`` class embeddings from prompt templates, ``embed`` gives raw ones ``(n, d)`` of texts.

    They have the mean norm of the template embeddings, not 1: cosines do not care, and an SAE trained on raw embeddings
    sees the scale it knows.

    Raises:
        InputError: A template without ``{}``.
    """
    if bad := [t for t in templates if "{}" not in t]:
        raise InputError(f"template {bad[0]!r} has no {{}} for the class name")
    prompts = [t.replace("{}", c) for c in classes for t in templates]
    rows = torch.cat([embed(prompts[i : i + batch_size]) for i in range(0, len(prompts), batch_size)]).float()
    rows = rows.unflatten(0, (len(classes), len(templates)))
    return pool_templates(rows) * rows.norm(dim=-1).mean()


def accuracy(scores: Tensor, labels: Tensor, k: int = 1) -> float:
    """Share of rows of ``scores (N, C)`` whose label is among the k best; exact ties count against the label."""
    return hits(scores, labels, k).double().mean().item()


def hits(scores: Tensor, labels: Tensor, k: int = 1) -> Tensor:
    """``(N,)`` bool: whose label is among the k best scores; exact ties count against the label."""
    right = torch.nn.functional.one_hot(labels.to(scores.device), scores.shape[1]).bool()
    return pessimistic_ranks(scores, right, tie=0.0) < k


@torch.no_grad()
def zero_shot_scores(sae: SAE, x: Tensor, classes: Tensor, chunk: int = 8192) -> dict[str, Tensor]:
    """Cosines of N raw image embeddings ``x (N, d)`` with C class embeddings, in three spaces.

    Returns:
        ``raw`` (embeddings), ``recon`` (reconstructions of both sides) and ``code`` (codes), each ``(N, C)``.
    """
    classes = classes.to(x.device)  # and so are all scores, wherever the SAE is
    h = sae.encode(classes, TEXT)
    to = {"raw": cosine_to(classes), "recon": cosine_to(sae.decode(h, TEXT)), "code": cosine_to_few(h)}
    out: dict[str, list[Tensor]] = {name: [] for name in to}
    for part in x.split(chunk):
        z = sae.encode(part, IMAGE)
        for name, q in (("raw", part), ("recon", sae.decode(z, IMAGE)), ("code", z)):
            out[name].append(to[name](q).to(x.device))
    return {name: torch.cat(v) for name, v in out.items()}


def enhance(raw: Tensor, concept: Tensor, alpha: float) -> Tensor:
    """``cos(x, c) + alpha cos(h_x, h_c)``; at ``alpha = 0`` exactly ``raw`` (VL-SAE, arXiv 2510.21323)."""
    return raw + alpha * concept if alpha else raw


def tune_alpha(
    scores: dict[str, Tensor], labels: Tensor, concept: str = "code", alphas: Sequence[float] = ALPHAS
) -> tuple[float, dict[float, float]]:
    """The alpha with the best top-1 (the smallest among equals), and ``{alpha: top-1}``; 0 is always tried."""
    tuning = {a: accuracy(enhance(scores["raw"], scores[concept], a), labels) for a in sorted({0.0, *alphas})}
    return max(tuning, key=lambda a: (tuning[a], -a)), tuning
