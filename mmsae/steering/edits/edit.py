"""Edits of SAE codes: small functions of single features, composed left to right.

``Edit.scale([3, 7], -5) + Edit.set(12, 3.0)`` is a value: it can be printed, compared, written to YAML and replayed.
What a strength means (``v`` of set and add, ``lo`` and ``hi`` of clamp) is said by the unit of the
:class:`~mmsae.steering.edits.intervention.Intervention` that carries the edit; thresholds ``tau`` are raw codes, ``g``
and ``b`` are factors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmsae.hosts.sites import Where
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
    """One primitive."""

    kind: str  #: A key of :data:`ARGUMENTS`.
    ids: tuple[int, ...] | None  #: The features; None for every feature that is active (``scale`` alone).
    args: dict[str, Any]  #: By name: a float, a tuple with one float per id, ``"corpus"`` (ablate), or a source tensor.

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


Ids = int | Sequence[int] | Tensor
Value = float | Sequence[float] | Tensor


@dataclass(frozen=True, eq=False)
class Edit:
    """A map of codes ``z -> z'`` with a support, the sequence of its primitives; ``Edit()`` changes nothing."""

    ops: tuple[Op, ...] = ()  #: Primitives in order of application.

    # Primitives; all take one feature id or several, and values that are one number or one per id.

    @classmethod
    def set(cls, ids: Ids, v: Value) -> Edit:
        """``z_i' = v``, also where the feature is off (creates the concept)."""
        return cls._one("set", ids, v=v)

    @classmethod
    def add(cls, ids: Ids, v: Value) -> Edit:
        """``z_i' = z_i + v``, clipped at 0 unless the SAE has signed codes."""
        return cls._one("add", ids, v=v)

    @classmethod
    def scale(cls, ids: Ids | None, g: Value) -> Edit:
        """``z_i' = g z_i``: acts only where the feature is active; ``g < 0`` pushes along ``-d_i``.

        ``ids=None`` scales every feature that is active (VS2, arXiv 2506.01247) and then stands alone.
        """
        return cls._one("scale", ids, g=g)

    @classmethod
    def clamp(cls, ids: Ids, lo: Value = -math.inf, hi: Value = math.inf) -> Edit:
        """``z_i' = min(max(z_i, lo), hi)``; only ``hi`` is a cap, only ``lo`` a floor."""
        return cls._one("clamp", ids, lo=lo, hi=hi)

    @classmethod
    def ablate(cls, ids: Ids, mean: Value | str | None = None) -> Edit:
        """``z_i' = 0``, or ``mean``: raw codes, or ``"corpus"`` for the mean over all rows of the statistics."""
        return cls._one("ablate", ids, mean=0.0 if mean is None else mean)

    @classmethod
    def swap(cls, ids: Ids, z_src: Tensor | Sequence) -> Edit:
        """``z_i' = z_src,i`` from another input.

        Codes there are ``(L,)`` pooled, for every token; ``(T, L)`` by token position (by item where there are no
        tokens); ``(B, T, L)`` by item and position.
        """
        return cls._one("swap", ids, z_src=z_src)

    @classmethod
    def cond_scale(cls, ids: Ids, g: Value, tau: Value) -> Edit:
        """``z_i' = g z_i if z_i > tau_i else z_i`` (SAeUron, arXiv 2501.18052); ``tau`` are raw codes."""
        return cls._one("cond_scale", ids, g=g, tau=tau)

    @classmethod
    def mix(cls, ids: Ids, z_src: Tensor | Sequence, b: Value) -> Edit:
        """``z_i' = (1 - b) z_i + b z_src,i``; ``z_src`` as in :meth:`swap`."""
        return cls._one("mix", ids, z_src=z_src, b=b)

    @classmethod
    def _one(cls, kind: str, ids: Ids | None, **args: Any) -> Edit:
        ids = None if ids is None else tuple(torch.as_tensor(ids).reshape(-1).tolist())
        if ids is not None and (len(set(ids)) != len(ids) or min(ids, default=0) < 0):
            raise InputError(f"edit {kind}: feature ids must be distinct and not negative, not {list(ids)[:8]}")
        return cls((Op(kind, ids, {k: value(kind, k, v, ids) for k, v in args.items()}),))

    # Composition.

    def then(self, other: Edit) -> Edit:
        """This edit, and then the other: a later set overrides, a scale after a set multiplies it."""
        both = Edit(self.ops + other.ops)
        if len(both.ops) > 1 and any(op.ids is None for op in both.ops):
            raise InputError("an edit of every active feature (ids=None) stands alone")
        return both

    def __add__(self, other: Edit) -> Edit:
        return self.then(other)

    @cached_property
    def ids(self) -> tuple[int, ...]:
        """The features it touches, ascending; empty for the empty edit and for :attr:`everything`."""
        return tuple(sorted({i for op in self.ops for i in op.ids or ()}))

    @property
    def everything(self) -> bool:
        """Whether it acts on every active feature."""
        return any(op.ids is None for op in self.ops)

    @property
    def strengths(self) -> bool:
        """Whether it has values that a unit applies to."""
        return any("strength" in ARGUMENTS[op.kind].values() for op in self.ops)

    def check(self, d_sae: int) -> None:
        """Refuse features that an SAE has not."""
        if self.ids and self.ids[-1] >= d_sae:
            raise InputError(f"edit: feature {self.ids[-1]} is not one of the SAE's {d_sae} latents (0 to {d_sae - 1})")

    def times(self, strength: float) -> Edit:
        """Strengths and factors (``v, lo, hi, g, b``) multiplied; thresholds and sources stay."""
        if strength == 1:
            return self

        def one(role: str, v: Any) -> Any:
            if role not in ("strength", "factor"):
                return v
            return each_number(lambda x: x if math.isinf(x) else strength * x, v)

        return Edit(tuple(op._replace(args=each_argument(op, one)) for op in self.ops))

    def raw(self, unit: Callable[[Tensor], Tensor], mean: Callable[[Tensor], Tensor]) -> Edit:
        """Strengths in raw codes.

        ``unit`` takes ids ``(L,)`` to the ``(L,)`` raw codes that strength 1 stands for, ``mean`` to corpus means, for
        ``ablate(mean="corpus")``.
        """

        def op_raw(op: Op) -> Op:
            if op.ids is None:
                return op
            ids = torch.tensor(op.ids, dtype=torch.long)

            def one(role: str, v: Any) -> Any:
                if isinstance(v, str):
                    return tuple(mean(ids).tolist())
                if role != "strength":
                    return v
                return tuple((torch.as_tensor(v, dtype=torch.float64) * unit(ids).double()).tolist())

            return op._replace(args=each_argument(op, one))

        return Edit(tuple(map(op_raw, self.ops)))

    def apply(self, z: Tensor, where: Where | None = None, signed: bool = False) -> Tensor:
        """Edited codes ``(N, L)``; strengths are taken as raw codes.

        Args:
            z: ``(N, L)`` codes of :attr:`ids`, in that order; not changed.
            where: What the rows are, for sources that are given by position.
            signed: Whether the SAE has signed codes, so that ``add`` does not clip.
        """
        support = torch.tensor(self.ids, dtype=torch.long)
        for op in self.ops:
            cols = torch.searchsorted(support, torch.tensor(op.ids, dtype=torch.long)).to(z.device)
            z = z.index_copy(1, cols, apply(op, z[:, cols], where, signed))
        return z

    # Files.

    def to_dict(self) -> list[dict[str, Any]]:
        """Plain values for YAML, one mapping per primitive; source tensors become lists."""

        def plain(v: Any) -> Any:
            return v.tolist() if isinstance(v, Tensor) else list(v) if isinstance(v, tuple) else v

        return [{"op": op.kind, "ids": plain(op.ids), **{k: plain(v) for k, v in op.args.items()}} for op in self.ops]

    @classmethod
    def from_dict(cls, ops: Iterable[Mapping[str, Any]]) -> Edit:
        """Make the edit again of what :meth:`to_dict` made.

        Raises:
            InputError: An unknown primitive, or arguments that it has not.
        """
        edit = cls()
        for given in ops:
            args = dict(given)
            kind, ids = args.pop("op", None), args.pop("ids", None)
            if kind not in ARGUMENTS:
                raise InputError(f"edit: op {kind!r} is not one of {', '.join(ARGUMENTS)}")
            if ids is None and kind != "scale":
                raise InputError(f"edit: op {kind} needs ids")
            if set(args) - set(ARGUMENTS[kind]):
                raise InputError(f"edit: op {kind} takes {', '.join(ARGUMENTS[kind])}, not {', '.join(sorted(args))}")
            try:
                edit = edit.then(getattr(cls, kind)(ids, **args))
            except InputError:
                raise
            except (TypeError, ValueError) as e:
                raise InputError(f"edit: op {kind} of features {ids}: {e}") from e
        return edit

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Edit) and self.to_dict() == other.to_dict()

    __hash__ = object.__hash__

    def __repr__(self) -> str:
        def show(op: Op) -> str:
            ids = list(op.ids[:4]) if op.ids is not None else None
            shown = {k: tuple(v.shape) if isinstance(v, Tensor) else v for k, v in op.args.items()}
            return f"{op.kind}({ids}{'...' if ids and len(op.ids) > 4 else ''}, {shown})"

        return f"Edit({' + '.join(map(show, self.ops))})"
