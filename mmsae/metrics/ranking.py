"""Rank statistics with ties done right: average ranks, AUROC, and ranks in which a tie counts against the truth."""

from __future__ import annotations

import torch
from torch import Tensor


def average_ranks(x: Tensor) -> Tensor:
    """``(N, L)`` float64 ranks 1..N within each column of ``x (N, L)``; equal values share the mean of their ranks."""
    v, order = x.T.contiguous().sort(1)  # sorting along the last dimension is ten times faster
    n = len(x)
    i = torch.arange(n, device=x.device).expand_as(v)
    change = v[:, 1:] != v[:, :-1]
    edge = torch.ones(len(v), 1, dtype=torch.bool, device=x.device)
    first = torch.where(torch.cat([edge, change], 1), i, 0).cummax(1).values
    last = torch.where(torch.cat([change, edge], 1), i, n - 1).flip(1).cummin(1).values.flip(1)
    ranks = (first + last).double() / 2 + 1
    return torch.empty_like(ranks).scatter_(1, order, ranks).T


def auroc_table(scores: Tensor, truth: Tensor) -> Tensor:
    """AUROC of every score column against every truth column, by one sort and one matrix product.

    Args:
        scores: ``(N, L)``.
        truth: ``(N, C)`` bool.

    Returns:
        ``(C, L)`` float64, ties counted half; NaN where a truth column has one class only.
    """
    t = truth.T.double()
    pos = t.sum(1, keepdim=True)
    wins = t @ average_ranks(scores) - pos * (pos + 1) / 2
    return wins / (pos * (len(truth) - pos))


def auroc_columns(scores: Tensor, truth: Tensor) -> Tensor:
    """``(C,)`` AUROC of score column c against truth column c, both ``(N, C)``; NaN where there is one class only."""
    t = truth.double()
    pos = t.sum(0)
    wins = (t * average_ranks(scores)).sum(0) - pos * (pos + 1) / 2
    return wins / (pos * (len(truth) - pos))


def auroc(positive: Tensor, negative: Tensor) -> float:
    """Chance that a positive's score exceeds a negative's, ties counted half.

    Args:
        positive: ``(P,)`` scores that should be high.
        negative: ``(M,)`` scores that should be low.

    Raises:
        ValueError: Empty or NaN scores, which have no rank.
    """
    scores = torch.cat([positive.detach(), negative.detach()])
    if not len(positive) or not len(negative) or scores.isnan().any():
        raise ValueError(f"AUROC needs finite scores on both sides, got {len(positive)} and {len(negative)} with NaNs "
                         f"in {int(scores.isnan().sum())}")  # fmt: skip
    truth = torch.zeros(len(scores), 1, dtype=torch.bool, device=scores.device)
    truth[: len(positive)] = True
    return auroc_columns(scores[:, None], truth).item()


def pessimistic_ranks(scores: Tensor, right: Tensor, tie: float = 1e-6) -> Tensor:
    """Number of wrong candidates that score at least as high as the best right one.

    Collapsed codes tie in blocks; counting ties against the truth keeps them from looking good.

    Args:
        scores: ``(n, m)`` of n queries against m candidates.
        right: ``(n, m)`` bool; every row has at least one True.
        tie: Scores closer than this are equal (matrix products of equal rows differ by rounding).

    Returns:
        ``(n,)`` int64, 0 is best.
    """
    best = scores.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
    return ((scores >= best - tie) & ~right).sum(1)
