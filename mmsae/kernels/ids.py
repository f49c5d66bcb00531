"""Ids of latents that are distinct within a row, also where a row has fewer than the others."""

from __future__ import annotations

import torch
from torch import Tensor


def distinct(ids: Tensor, used: Tensor) -> Tensor:
    """``ids (N, K)`` with the entries that are not ``used`` filled with other ids, so that a row has none twice."""
    k = ids.shape[1]
    taken = torch.zeros(len(ids), k + 1, dtype=torch.long, device=ids.device)
    taken.scatter_(1, torch.where(used, ids, k).clamp(max=k), 1)  # of the first k ids enough are free
    free = taken[:, :k].sort(dim=1, stable=True).indices
    return torch.where(used, ids, free.gather(1, ((~used).cumsum(1) - 1).clamp(min=0)))
