"""Concept quality by an independent judge: do a latent's top images and top texts mean the same, and only the same?

Intra- and inter-similarity of VL-SAE (arXiv 2510.21323).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize


def intra_inter(image: Tensor, text: Tensor) -> dict[str, float]:
    """Similarity of latents' mean image features with mean text features.

    Args:
        image: ``(L, d)`` mean judge feature of each latent's top images (features not normalised before the mean).
        text: ``(L, d)`` likewise for its top texts.

    Returns:
        ``intra``: mean cosine of a latent's two sides, higher is better; ``inter_upper``: mean cosine of image i with
        text j over i < j, the published form, which depends on the order of the latents; ``inter_sym``: the same over
        all i != j; lower is better. NaN for the inter scores of fewer than two latents.
    """
    cos = normalize(image.double(), dim=1) @ normalize(text.double(), dim=1).T
    n = len(cos)
    upper = cos.triu(1).sum() * 2
    off = cos.sum() - cos.diagonal().sum()
    pairs = n * (n - 1) if n > 1 else float("nan")
    return {"intra": cos.diagonal().mean().item(), "inter_upper": upper.item() / pairs, "inter_sym": off.item() / pairs}


def top_means(rows: Tensor, features: Tensor) -> Tensor:
    """``(L, d)`` mean of the judge's ``features (N, d)`` over each latent's top samples.

    ``rows (L, n)`` are their rows in ``features``, -1 where a latent has fewer than n.
    """
    rows = rows.to(features.device)
    has = (rows >= 0).to(features.dtype)
    total = torch.nn.functional.embedding_bag(rows.clamp(min=0), features, mode="sum", per_sample_weights=has)
    return total / has.sum(1, keepdim=True).clamp(min=1)


def concept_similarity(
    image_rows: Tensor, text_rows: Tensor, image: Tensor, text: Tensor, n_latents: int = 100, seed: int = 42
) -> dict[str, float]:
    """:func:`intra_inter` of latents drawn at random from those with top samples in both modalities.

    Args:
        image_rows: ``(d_sae, n)`` row in ``image`` of each latent's top images, -1 for none (``TopTable.rows_in``).
        text_rows: ``(d_sae, n)`` row in ``text`` of its top texts.
        image: ``(N, d)`` judge's image features; the judge is not the host that the SAE was trained on.
        text: ``(M, d)`` judge's text features.
        n_latents: How many to draw, without replacement; all when there are fewer.
        seed: Seed of the draw.

    Returns:
        The scores, and ``latents``: how many were drawn.
    """
    alive = ((image_rows >= 0).any(1) & (text_rows >= 0).any(1)).nonzero().flatten()
    draw = torch.randperm(len(alive), generator=torch.Generator().manual_seed(seed))[:n_latents].to(alive.device)
    ids = alive[draw]
    scores = intra_inter(top_means(image_rows[ids], image), top_means(text_rows[ids], text))
    return {**scores, "latents": len(ids)}
