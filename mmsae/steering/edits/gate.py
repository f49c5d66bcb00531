"""Where an intervention acts: tokens, places of a map, guidance branches, steps, phases, and what the codes say.

Every gate is a row weight made from :class:`~mmsae.hosts.sites.Where`; none counts calls or guesses from shapes.
Spec of hooks: gates are exact, so rows with weight 0 stay bit-identical.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mmsae.hosts.sites import COND, Where
from mmsae.types import TEXT, InputError

POLICIES = ("content", "eos", "pad", "image", "text", "all")
BRANCHES = ("all", "cond", "uncond", "sign")
PHASES = ("prefill", "decode", "both")


@dataclass(frozen=True, eq=False)
class Gate:
    """Where to act; every condition must hold.

    Attributes:
        tokens: ``content`` (no class, register, BOS, EOS, padding or template tokens), ``eos``, ``pad``, ``image``,
            ``text``, ``all``, or positions; None: ``content`` on text sites, else ``all``.
        space: ``(H, W)`` weights in [0, 1], average-pooled to the site's grid; ``(B, H, W)`` has one map per item.
        branch: Guidance branches: ``all``, ``cond``, ``uncond``, or ``sign`` (+ on cond, - on uncond).
            Hosts without branches are all ``cond``.
        steps: Half-open window ``(start, end)`` of generation steps; ``range(a, b)`` does too. None: all.
        phase: ``prefill``, ``decode`` (the call holds generated tokens) or ``both``.
        active: Act only on rows where one of the edit's features exceeds this raw code (one number, or one per id of
            the edit in ascending order).
        guard: Act only on samples of which the SAE leaves less than this share of the variance unexplained: a code that
            does not describe a sample is no handle on it (VS2, arXiv 2506.01247).
    """

    tokens: str | Sequence[int] | None = None
    space: Tensor | Sequence | None = None
    branch: str = "cond"
    steps: tuple[int, int] | range | None = None
    phase: str = "both"
    active: float | Sequence[float] | None = None
    guard: float | None = None

    def __post_init__(self) -> None:
        put = object.__setattr__
        for name, known in {"branch": BRANCHES, "phase": PHASES, "tokens": (*POLICIES, None)}.items():
            value = getattr(self, name)
            if (isinstance(value, str) or value is None) and value not in known:
                raise InputError(f"gate: {name} {value!r} is not one of {', '.join(k for k in known if k)}")
        if self.tokens is not None and not isinstance(self.tokens, str):
            put(self, "tokens", tuple(int(i) for i in self.tokens))
        if self.steps is not None:
            start, end = (self.steps[0], self.steps[-1] + 1) if _is_range(self.steps) else map(int, self.steps)
            if not 0 <= start < end:
                raise InputError(f"gate: steps [{start}, {end}) hold no step")
            put(self, "steps", (start, end))
        if self.space is not None:
            space = torch.as_tensor(self.space, dtype=torch.float32)
            if space.ndim not in (2, 3) or not ((space >= 0) & (space <= 1)).all():
                raise InputError(f"gate: space has shape {tuple(space.shape)}; it is (H, W) or (B, H, W) within [0, 1]")
            put(self, "space", space)
        if self.guard is not None:
            put(self, "guard", float(self.guard))
        if self.active is not None:
            active = torch.as_tensor(self.active, dtype=torch.float64)
            put(self, "active", active.item() if active.ndim == 0 else tuple(active.tolist()))

    def check_steps(self, n: int) -> None:
        """Refuse a window that ends after the last of ``n`` steps."""
        if self.steps is not None and self.steps[1] > n:
            raise InputError(f"gate: steps [{self.steps[0]}, {self.steps[1]}) leave the schedule, which has {n} steps")

    def weight(self, where: Where, modality: str = "") -> Tensor:
        """``(N, 1)`` float32 weight of each row by all but ``active`` and ``guard``; negative only with ``sign``.

        Raises:
            InputError: A condition on something that this site does not have.
        """
        w = torch.ones(len(where.item), device=where.item.device)
        if self.phase != "both" and (self.phase == "prefill") != where.prefill():
            return torch.zeros_like(w)[:, None]
        if self.steps is not None:
            if where.step is None:
                raise InputError(f"gate: steps {list(self.steps)} at a site that runs outside of a generation's steps")
            if not self.steps[0] <= where.step < self.steps[1]:
                return torch.zeros_like(w)[:, None]
        w = w * self._tokens(where, modality)
        if self.space is not None:
            w = w * self._space(where)
        return (w * self._branch(where))[:, None]

    def _branch(self, where: Where) -> Tensor | float:
        if self.branch == "all":
            return 1.0
        if where.branch is None:
            if self.branch == "uncond":
                raise InputError("gate: branch 'uncond' at a site without guidance branches would never act")
            return 1.0
        cond = (where.branch == COND).float()
        return {"cond": cond, "uncond": 1 - cond, "sign": 2 * cond - 1}[self.branch]

    def _tokens(self, where: Where, modality: str) -> Tensor | float:
        policy = self.tokens
        if policy is None:
            policy = "content" if modality == TEXT else "all"
        if policy == "all" or (policy in ("image", "text") and where.image is None and modality == policy):
            return 1.0
        if policy in ("image", "text"):
            if where.image is None:
                raise InputError(f"gate: tokens {policy!r} at a site of {modality or 'one modality'}")
            return (where.image == (policy == "image")).float()
        if not isinstance(policy, str):
            if where.position is None:
                raise InputError(f"gate: token positions {list(policy)[:8]} at a site with one row per item")
            return torch.isin(where.position, torch.tensor(policy, device=where.position.device)).float()
        if where.special is None:
            if policy == "content":
                return 1.0
            raise InputError(f"gate: tokens {policy!r} at a site that has no such tokens")
        if policy == "content":
            return (~where.special).float()
        end = _ends(where)[where.item]
        return (where.special & ((where.position == end) if policy == "eos" else (where.position > end))).float()

    def _space(self, where: Where) -> Tensor:
        if where.grid is None or where.position is None:
            raise InputError("gate: space at a site that is no map")
        space = self.space if self.space.ndim == 3 else self.space[None]
        if self.space.ndim == 3 and len(where.item) and int(where.item.max()) >= len(space):
            raise InputError(f"gate: space has maps of {len(space)} items, the batch has {int(where.item.max()) + 1}")
        cells = F.adaptive_avg_pool2d(space[:, None], where.grid).flatten(1).to(where.item.device)
        return cells[where.item if len(cells) > 1 or self.space.ndim == 3 else 0, where.position]

    def acting(self, codes: Tensor) -> Tensor:
        """``(N,) bool`` rows where a feature exceeds ``active``; ``codes (N, L)`` of the edit's features."""
        tau = torch.as_tensor(0.0 if self.active is None else self.active, dtype=codes.dtype, device=codes.device)
        if tau.ndim and len(tau) != codes.shape[1]:
            raise InputError(f"gate: active has {len(tau)} thresholds, the edit {codes.shape[1]} features")
        return (codes > tau).any(1)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for YAML, defaults left out."""
        out = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Tensor):
                value = value.tolist()
            elif isinstance(value, tuple):
                value = list(value)
            if value != f.default:
                out[f.name] = value
        return out


def _is_range(steps: Any) -> bool:
    if isinstance(steps, range) and (steps.step != 1 or not len(steps)):
        raise InputError(f"gate: {steps} is no window of steps: give range(start, end)")
    return isinstance(steps, range)


def _ends(where: Where) -> Tensor:
    """``(items,)`` position of each item's EOS: its first special token after position 0, where BOS is.

    The host's flags do not tell EOS from padding; in texts padded on the right (CLIP, T5) this does.
    """
    if where.image is not None or where.position is None or where.grid is not None:
        raise InputError("gate: tokens 'eos' and 'pad' are for text encoders, whose texts end in one EOS token")
    far = torch.iinfo(torch.long).max
    at = torch.where(where.special & (where.position > 0), where.position, far)
    n = int(where.item.max()) + 1 if len(where.item) else 0
    return torch.full((n,), far, device=at.device).scatter_reduce(0, where.item, at, "amin")
