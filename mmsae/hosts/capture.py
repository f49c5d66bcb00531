"""Rows of a host's tensors: one function taps a site, reading and editing are what is done with the rows there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from mmsae.hosts.hooks import Done, watch_input
from mmsae.hosts.sites import Target, Where, find_port
from mmsae.hosts.tokens import Marks, from_tokens, keep_mask, put, take, to_tokens
from mmsae.types import IMAGE, TEXT, ImageTextBatch, InputError

if TYPE_CHECKING:
    from mmsae.hosts.base import Host


class Rows(NamedTuple):
    """What was read at one site.

    Attributes:
        x: ``(N, d)`` float32.
        item: ``(N,)`` int64, which item of the batch.
        position: ``(N,)`` int64, which token; None for pooled sites.
        special: ``(N,)`` bool, class, register, BOS, EOS or padding token; None for pooled sites.
    """

    x: Tensor
    item: Tensor
    position: Tensor | None = None
    special: Tensor | None = None


@contextmanager
def tap(host: Host, target: Target, fn: Callable[[Tensor, Where], Tensor]) -> Iterator[None]:
    """While the context is open, send the rows of a site through ``fn(rows, where)``.

    ``rows (N, d)`` are float32. If ``fn`` returns the same object, the host's tensor stays the same object.
    """
    ids: list[Tensor] = []

    def on(x: Tensor) -> Tensor:
        if host._probing:
            return x
        tokens = to_tokens(x, target.layout)
        marks = keep = None
        if target.has_tokens:
            marks = host._marks(target.modality, tokens, ids[0] if ids else None, target.layout.ndim == 4)
            keep = None if target.tokens == "all" else keep_mask(target.tokens, marks)
        rows = take(tokens.float(), keep, target.pooled)
        new = fn(rows, _where(x, target, keep, marks))
        if new is rows:
            return x
        if new.shape != rows.shape:
            raise InputError(f"the edit at {target} returned shape {tuple(new.shape)}, not {tuple(rows.shape)}.")
        return from_tokens(put(tokens, keep, target.pooled, rows, new), x, target.layout)

    with ExitStack() as stack:
        entry = host._ids_entry()
        if target.has_tokens and target.modality == TEXT and entry is not None:
            stack.enter_context(watch_input(entry, ids))
        stack.enter_context(find_port(host, target.module, target.io).attach(on))
        yield


def _where(x: Tensor, target: Target, keep: Tensor | None, marks: Marks | None) -> Where:
    """What the rows of :func:`tap` are."""
    n = x.shape[target.layout.batch]
    if target.pooled or marks is None:
        return Where(torch.arange(n, device=x.device))
    kept = torch.ones_like(marks.content) if keep is None else keep
    item, position = kept.nonzero(as_tuple=True)
    grid = None
    if target.layout.ndim == 4:
        h, w = x.movedim((target.layout.batch, target.layout.channel), (0, -1)).shape[1:3]
        grid = (h, w)
    return Where(item, position, special=marks.special[kept], grid=grid)


def read(host: Host, batch: ImageTextBatch, targets: list[Target]) -> list[Rows]:
    """Rows at several sites, in their order, with one forward pass per modality that stops when all are read."""
    got: dict[int, Rows] = {}
    for modality in dict.fromkeys(t.modality for t in targets):
        x = batch.images if modality == IMAGE else batch.texts
        if x is None:
            raise InputError(f"a site reads the {modality}s of a batch that has none.")
        wanted = [i for i, t in enumerate(targets) if t.modality == modality]
        with suppress(Done), ExitStack() as stack:
            for i in wanted:
                stack.enter_context(tap(host, targets[i], _recorder(i, got, wanted)))
            host._run(modality, x)
    return [got[i] for i in range(len(targets))]


def _recorder(i: int, got: dict[int, Rows], wanted: list[int]) -> Callable[..., Tensor]:
    """A function for :func:`tap` that keeps the rows, and stops the forward pass after the last site."""

    def record(rows: Tensor, where: Where) -> Tensor:
        # cloned at once: the host may go on in place (ReLU) on this very memory
        got[i] = Rows(rows.clone(), where.item, where.position, where.special)
        if all(j in got for j in wanted):
            raise Done
        return rows

    return record
