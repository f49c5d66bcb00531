"""Rows of a host's tensors: one function taps a site, reading and editing are what is done with the rows there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmsae.hosts.hooks import Done, Port
from mmsae.hosts.sites import Target, Where
from mmsae.hosts.tokens import from_tokens, put, take
from mmsae.types import ImageTextBatch, InputError, Tokens


class Rows(NamedTuple):
    """What was read at one site."""

    x: Tensor  #: ``(N, d)`` float32.
    item: Tensor  #: ``(N,)`` int64, which item of the batch.
    position: Tensor | None = None  #: ``(N,)`` int64, which token; None for pooled sites.
    special: Tensor | None = None  #: ``(N,)`` bool, class, register, BOS, EOS or padding token; None for pooled sites.
    grad: Tensor | None = None  #: ``(N, d)`` float32 derivative of a loss of the host by ``x``, where it was asked for.
    role: Tensor | None = None  #: ``(N,)`` uint8, places in :data:`mmsae.types.ROLES`; None but for conversations.

    @staticmethod
    def tokens(rows: Mapping[str, Rows], batch: ImageTextBatch) -> Tokens:
        """What was read at several sites of a batch, by their names."""
        columns = {f: {n: v for n, r in rows.items() if (v := getattr(r, f)) is not None} for f in Rows._fields}
        more = {f: column or None for f, column in columns.items() if f not in ("x", "item")}
        return Tokens(columns["x"], columns["item"], batch.uids, faults=batch.faults, **more)


class Picked(NamedTuple):
    """The rows of a site in one call of the host."""

    tokens: Tensor  #: ``(B, T, d)`` the host's tensor.
    where: Where  #: Which rows they are.
    keep: Tensor | None = None  #: ``(B, T)`` which tokens are rows (or are averaged); None for all.
    pooled: bool = False  #: Whether the rows are means over the kept tokens, one per item.

    def take(self) -> Tensor:
        """``(N, d)`` float32 rows."""
        return take(self.tokens.float() if self.pooled else self.tokens, self.keep, self.pooled).float()

    def put(self, old: Tensor, new: Tensor) -> Tensor:
        """The tokens with the rows ``old`` replaced by ``new``; never in place."""
        return put(self.tokens, self.keep, self.pooled, old, new)


def places(tokens: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    """Item and position of the rows of ``tokens (B, T, d)`` that are kept, ``(N,)`` each."""
    if keep is not None:
        return keep.nonzero(as_tuple=True)
    b, t, at = *tokens.shape[:2], tokens.device
    return torch.arange(b, device=at).repeat_interleave(t), torch.arange(t, device=at).repeat(b)


Use = Callable[[Tensor, Where], Tensor]


@contextmanager
def tap(port: Port, target: Target, pick: Callable[[Tensor], Picked | None], fn: Use) -> Iterator[None]:
    """While the context is open, send the rows of a site through ``fn(rows, where)``.

    If ``fn`` returns the same object, the host's tensor stays the same object. Calls in which ``pick`` finds no rows
    (None) pass by.
    """

    def on(x: Tensor) -> Tensor:
        picked = pick(x)
        if picked is None:
            return x
        rows = picked.take()
        new = fn(rows, picked.where)
        if new is rows:
            return x
        if new.shape != rows.shape:
            raise InputError(f"the edit at {target} returned shape {tuple(new.shape)}, not {tuple(rows.shape)}.")
        return from_tokens(picked.put(rows, new), x, target.layout)

    with port.attach(on):
        yield


def collect(taps: Sequence[Callable[[Use], AbstractContextManager]], run: Callable[[], Any]) -> list[Rows | None]:
    """Rows at several taps, None where not reached, from one run of the host that stops when all are read.

    Args:
        taps: ``tap(fn)`` is open while the host runs.
        run: Runs the host.
    """
    got: list[Rows | None] = [None] * len(taps)

    def recorder(i: int) -> Use:
        def record(rows: Tensor, where: Where) -> Tensor:
            # cloned at once: the host may go on in place (ReLU) on this very memory
            got[i] = Rows(rows.clone(), where.item, where.position, where.special, role=where.role)
            if all(g is not None for g in got):
                raise Done
            return rows

        return record

    with suppress(Done), ExitStack() as stack:
        for i, opened in enumerate(taps):
            stack.enter_context(opened(recorder(i)))
        run()
    return got


def differentiate(
    taps: Sequence[Callable[[Use], AbstractContextManager]], loss: Callable[[], Tensor], name: str
) -> list[Rows | None]:
    """Rows at several taps with the derivative of a loss by them, None where not reached, from one run of the host.

    To every row a vector of zeros is added, by which the loss is differentiated: none of the host's numbers changes,
    and sites may lie one behind the other.

    Args:
        taps: ``tap(fn)`` is open while the host runs.
        loss: Runs the host with gradients enabled; ``(n,)`` terms, whose sum is differentiated.
        name: What the loss is called in messages.
    """
    got: list[Rows | None] = [None] * len(taps)
    added: dict[int, Tensor] = {}

    def recorder(i: int) -> Use:
        def record(rows: Tensor, where: Where) -> Tensor:
            if i in added:
                raise InputError(f"gradient {name}: the host computes a site more than once; it has no one gradient.")
            got[i] = Rows(rows.detach().clone(), where.item, where.position, where.special, role=where.role)
            added[i] = torch.zeros_like(rows).requires_grad_()
            return rows + added[i]

        return record

    with torch.inference_mode(False), torch.enable_grad(), ExitStack() as stack:
        for i, opened in enumerate(taps):
            stack.enter_context(opened(recorder(i)))
        total = loss().float().sum()
        if added and not total.requires_grad:
            raise InputError(f"gradient {name}: the loss does not depend on any site that is read.")
        found = torch.autograd.grad(total, list(added.values()), materialize_grads=True) if added else ()
    for i, grad in zip(added, found, strict=True):
        got[i] = got[i]._replace(grad=grad)
    return got
