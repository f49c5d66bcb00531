"""Activations of generations: some steps and some positions of every image, nothing held for long."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from mmsae.hosts.sites import COND, UNCOND, Where
from mmsae.types import InputError, Tokens

Branch = Literal["cond", "uncond", "all"]
BRANCHES = {"cond": (COND,), "uncond": (UNCOND,), "all": (UNCOND, COND)}


def draw_steps(sample: int | Sequence[int] | None, n: int, draw: torch.Generator) -> set[int]:
    """Which of ``n`` steps are read: all, so many of them, or those that are given."""
    if isinstance(sample, int):
        sample = torch.randperm(n, generator=draw)[: max(1, sample)].tolist()
    wanted = set(range(n) if sample is None else sample)
    if not wanted or min(wanted) < 0 or max(wanted) >= n:
        raise InputError(f"sample_steps is {sorted(wanted)}, but the schedule has steps 0 to {n - 1}.")
    return wanted


def keeper(
    got: list, branches: tuple[int, ...], maps: bool, positions: int | None, draw: torch.Generator
) -> Callable[[Tensor, Where], Tensor]:
    """An edit that changes nothing and keeps some of the rows in ``got``."""

    def keep(rows: Tensor, where: Where) -> Tensor:
        on_now = set(branches) & set(where.branch.unique().tolist())
        again = not maps and any(on_now <= set(w.branch.tolist()) for _, w in got)
        if not on_now or again:  # text is encoded once more for an edit with a window of steps
            return rows
        on = torch.isin(where.branch, where.branch.new_tensor(branches))
        if maps and positions is not None and where.position is not None:
            n = int(where.position.max()) + 1
            on &= torch.isin(where.position, torch.randperm(n, generator=draw)[:positions].to(on.device))
        kept = Where(*(v[on] if isinstance(v, Tensor) else v for v in where))
        got.append((rows[on], kept))
        return rows

    return keep


def to_tokens(got: Mapping[str, list[tuple[Tensor, Where]]], items: Tensor) -> Tokens:
    """What was kept in one call, whose images are of the prompts ``items``."""
    first = int(items[0])
    x = {m: torch.cat([r for r, _ in rows]) for m, rows in got.items()}
    item = {m: torch.cat([w.item for _, w in rows]) - first for m, rows in got.items()}
    position, special = (
        {m: torch.cat([getattr(w, k) for _, w in r]) for m, r in got.items() if getattr(r[0][1], k) is not None}
        for k in ("position", "special")
    )
    return Tokens(x, item, [str(i) for i in items.tolist()], position or None, special or None)
