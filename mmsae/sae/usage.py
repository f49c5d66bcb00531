"""Which latents fire: the single source for AuxK, reports and anything that acts on dead or dying latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from mmsae.sae.normaliser import all_reduce
from mmsae.types import Codes

DEAD_AFTER = 1_000_000  # tokens without firing after which a latent counts as dead, where nothing else is said


def fired_counts(codes: Codes) -> Tensor:
    """``(d_sae,)`` int64: in how many rows each latent fired (value not 0, whatever its sign)."""
    fired = (codes.values != 0).long()
    if codes.indices is None:
        return fired.sum(0)
    out = torch.zeros(codes.d_sae, dtype=torch.long, device=fired.device)
    return out.scatter_add_(0, codes.indices.reshape(-1), fired.reshape(-1))


class UsageTracker(nn.Module):
    """Tokens since each latent fired, and fire counts, per modality; summed over ranks; all counts in tokens."""

    def __init__(self, d_sae: int, modalities: Sequence[str]):
        super().__init__()
        self.modalities = tuple(modalities)
        each = torch.zeros(len(modalities), d_sae, dtype=torch.long)
        self.register_buffer("since", each)  # tokens of the modality since the latent last fired on it
        self.register_buffer("counts", each.clone())  # rows on which the latent fired since reset()
        self.register_buffer("tokens", torch.zeros(len(modalities), dtype=torch.long))  # rows seen since reset()

    @torch.no_grad()
    def update(self, codes: Mapping[str, Codes]) -> None:
        """Count one step's codes of ``{modality: Codes}``; every rank must call it with the same modalities."""
        rows = [self.modalities.index(m) for m in codes]
        fired = torch.stack([fired_counts(c) for c in codes.values()])
        seen = torch.tensor([c.n for c in codes.values()], device=fired.device)
        all_reduce(fired, seen)
        self.since[rows] = torch.where(fired > 0, 0, self.since[rows] + seen[:, None])
        self.counts[rows] += fired
        self.tokens[rows] += seen

    def reset(self) -> None:
        """Start new counts (tokens since fired go on)."""
        self.counts.zero_()
        self.tokens.zero_()

    def known(self, tokens: int) -> bool:
        """Whether enough rows were seen of every modality that a latent could count as dead after ``tokens``."""
        return bool((self.tokens >= tokens).all())

    def dead(self, tokens: int, modality: str | None = None) -> Tensor:
        """``(d_sae,)`` bool: not fired for ``tokens`` rows on a modality, or (None) on any modality."""
        since = self.since.min(0).values if modality is None else self.since[self.modalities.index(modality)]
        return since >= tokens

    def density(self, modality: str) -> Tensor:
        """``(d_sae,)`` share of a modality's rows on which each latent fired since :meth:`reset`."""
        row = self.modalities.index(modality)
        return self.counts[row] / self.tokens[row].clamp(min=1)
