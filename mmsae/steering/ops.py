"""The primitives of an edit: what they take, and what they do to the columns of their own features."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmsae.backbones.where import Where
from mmsae.types import InputError

#: ``{kind: {argument: what it is}}``; strengths are in the intervention's unit, the rest is raw
ARGUMENTS = {
    "set": {"v": "strength"},
    "add": {"v": "strength"},
    "clamp": {"lo": "strength", "hi": "strength"},
    "scale": {"g": "factor"},
    "cond_scale": {"g": "factor", "tau": "code"},
    "ablate": {"mean": "code"},
    "swap": {"z_src": "source"},
    "mix": {"z_src": "source", "b": "factor"},
}


class Op(NamedTuple):
    """One primitive.

    Attributes:
        kind: A key of :data:`ARGUMENTS`.
        ids: The features; None for every feature that is active (``scale`` alone).
        args: By name: a float, a tuple with one float per id, ``"corpus"`` (ablate), or a source tensor.
    """

    kind: str
    ids: tuple[int, ...] | None
    args: dict[str, Any]

    def tensor(self, name: str, like: Tensor) -> Tensor:
        """``()`` or ``(L,)`` value of an argument."""
        return torch.as_tensor(self.args[name], dtype=like.dtype, device=like.device)


def value(kind: str, name: str, v: Any, ids: tuple[int, ...] | None) -> Any:
    """An argument as a float, a tuple with one float per id, or a source tensor."""
    if isinstance(v, str):
        if (kind, name, v) != ("ablate", "mean", "corpus"):
            raise InputError(f"edit {kind}: {name} is {v!r}, not a number")
        return v
    t = torch.as_tensor(v, dtype=torch.float64)
    n = None if ids is None else len(ids)
    if ARGUMENTS[kind][name] == "source":
        if t.ndim not in (1, 2, 3) or t.shape[-1] != n:
            raise InputError(f"edit {kind}: z_src has shape {tuple(t.shape)}, which does not end in the {n} features")
        return t.float()
    if t.ndim == 0:
        return t.item()
    if n is None or t.shape != (n,):
        raise InputError(f"edit {kind}: {name} has shape {tuple(t.shape)}, but there are {n} features")
    return tuple(t.tolist())


def each_number(fn: Callable[[float], float], v: Any) -> Any:
    """A float, or every number of a tuple, through ``fn``."""
    return tuple(map(fn, v)) if isinstance(v, tuple) else fn(v)


def each_argument(op: Op, fn: Callable[[str, Any], Any]) -> dict[str, Any]:
    """The arguments of a primitive through ``fn(role, value)``."""
    return {k: fn(ARGUMENTS[op.kind][k], v) for k, v in op.args.items()}


def source(op: Op, z: Tensor, where: Where | None) -> Tensor:
    """``(L,)`` or ``(N, L)`` codes of the other input."""
    src = op.args["z_src"].to(z)
    if src.ndim == 1:
        return src
    if where is None:
        raise InputError(f"edit {op.kind}: z_src of shape {tuple(src.shape)} needs to know the rows' positions")
    at = where.item if where.position is None else where.position
    index = (at,) if src.ndim == 2 else (where.item, at)
    for axis, i in enumerate(index):
        if len(i) and int(i.max()) >= src.shape[axis]:
            raise InputError(f"edit {op.kind}: z_src has {src.shape[axis]} rows, but row {int(i.max())} was asked for")
    return src[index]


def apply(op: Op, z: Tensor, where: Where | None, signed: bool) -> Tensor:
    """One primitive on its own columns ``z (N, L)``."""
    if op.kind == "set":
        return op.tensor("v", z).expand_as(z)
    if op.kind == "add":
        moved = z + op.tensor("v", z)
        return moved if signed else moved.clamp(min=0)
    if op.kind == "scale":
        return z * op.tensor("g", z)
    if op.kind == "clamp":
        return z.maximum(op.tensor("lo", z)).minimum(op.tensor("hi", z))
    if op.kind == "ablate":
        return op.tensor("mean", z).expand_as(z)
    if op.kind == "cond_scale":
        return torch.where(z > op.tensor("tau", z), op.tensor("g", z) * z, z)
    other = source(op, z, where)
    if op.kind == "swap":
        return other.expand_as(z)
    return torch.lerp(z, other.expand_as(z), op.tensor("b", z))
