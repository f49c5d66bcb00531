"""Directions against hallucination, found on answers that are known, and edits of the state along them.

SSL (arXiv 2505.16146) pushes image tokens along a faithful latent and, while
decoding, tokens away from a hallucination latent; SAVE (arXiv 2512.07730) adds the mean of faithful latents and
subtracts that of hallucination ones everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mmsae.hosts.sites import Where
from mmsae.metrics.sparsity import latent_sums
from mmsae.sae import SAE
from mmsae.types import TEXT, Codes, InputError

TokenEdit = Callable[[Tensor, Where], Tensor]


class AnswerLatents(NamedTuple):
    """Latents that go with right answers, and with wrong ones."""

    faithful: Tensor  #: ``(n,)`` ids, strongest first.
    hallucination: Tensor  #: ``(n,)`` ids.
    difference: Tensor  #: ``(d_sae,)`` ``P(fires | right) - P(fires | wrong)``.
    answers: int  #: Right answers that were used, and as many wrong ones.


def find_latents(codes: Codes, right: Tensor, n: int = 10, seed: int = 0) -> AnswerLatents:
    """Latents whose firing differs most between questions that were answered rightly and wrongly (SAVE).

    Args:
        codes: One row per question, e.g. max-pooled over its tokens.
        right: ``(N,)`` bool.
        n: Latents of each kind.
        seed: Seed of the draw that makes the two sets equally large.

    Raises:
        InputError: All answers are right, or none is.
    """
    sides = [right.nonzero()[:, 0], (~right).nonzero()[:, 0]]
    size = min(map(len, sides))
    if not size:
        raise InputError(f"{len(sides[0])} answers are right and {len(sides[1])} wrong: directions need both kinds")
    g = torch.Generator().manual_seed(seed)
    rates = []
    for side in sides:  # drawn, not cut off: shards are in an order
        rows = codes.rows(side[torch.randperm(len(side), generator=g)[:size].to(side.device)])
        rates.append(latent_sums(rows)[0].double() / size)
    difference = rates[0] - rates[1]
    order = difference.argsort(descending=True, stable=True)
    return AnswerLatents(order[:n], order.flip(0)[:n], difference, size)


def unit_direction(sae: SAE, latents: Tensor) -> Tensor:
    """``(d,)`` unit vector: the mean of the unit atoms of some latents."""
    atoms = sae.dictionary(TEXT if TEXT in sae.modalities else sae.modalities[0]).rows()[latents]
    return normalize(normalize(atoms.detach(), dim=1).mean(0), dim=0)


def ssl_edit(faithful: Tensor, hallucination: Tensor, gamma: float) -> TokenEdit:
    """Image tokens of the prompt gain ``gamma |x|`` along ``faithful``; generated ones lose it along ``hallucination``.

    Generated tokens are known by the cache, so it must be on.
    """

    def edit(rows: Tensor, where: Where) -> Tensor:
        if not gamma:
            return rows
        size = gamma * rows.norm(dim=1, keepdim=True)
        if not where.prefill():
            return rows - size * hallucination.to(rows)
        return rows + where.image[:, None] * size * faithful.to(rows)

    return edit


def save_edit(faithful: Tensor, hallucination: Tensor, gamma: float, alpha: float | None = None) -> TokenEdit:
    """All tokens but the first gain ``faithful - hallucination``, times ``alpha``, or ``gamma |x|`` without one.

    The first token's state is many times larger than others; those of the template are moved, for the last one of them
    is where an answer begins.
    """

    def edit(rows: Tensor, where: Where) -> Tensor:
        size = gamma * rows.norm(dim=1, keepdim=True) if alpha is None else torch.full_like(rows[:, :1], alpha)
        if not size.any():
            return rows
        return rows + (where.position > 0)[:, None] * size * (faithful - hallucination).to(rows)

    return edit
