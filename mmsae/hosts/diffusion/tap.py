"""Rows of the tensors of a diffusion pipeline: like :mod:`mmsae.hosts.capture`, with branch, step and grid."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from mmsae.hosts.capture import Rows
from mmsae.hosts.diffusion.call_state import Run
from mmsae.hosts.diffusion.prompts import text_marks
from mmsae.hosts.hooks import Done, watch_input
from mmsae.hosts.sites import Target, Where
from mmsae.hosts.tokens import Marks, from_tokens, keep_mask, put, take, to_tokens
from mmsae.types import TEXT, InputError

if TYPE_CHECKING:
    from mmsae.hosts.diffusion.host import DiffusionHost


class Edit:
    """An edit that is open.

    Attributes:
        target: Where.
        steps: ``(start, end)`` between which it holds, or None.
        at: Steps of the denoiser at which it does, or None: what is not read is not even copied.
    """

    def __init__(self, target: Target, steps: tuple[int, int] | None = None, at: set[int] | None = None):
        self.target, self.steps, self.at = target, steps, at

    def holds(self, run: Run | None) -> bool:
        """Whether it does, now."""
        if self.at is not None and run.step not in self.at:
            return False
        if self.steps is None or run is None:
            return True
        if self.target.modality == TEXT:
            return run.active is None or self in run.active
        return self.steps[0] <= run.step < self.steps[1]


@contextmanager
def tap(host: DiffusionHost, edit: Edit, fn: Callable[[Tensor, Where], Tensor]) -> Iterator[None]:
    """While the context is open, send the rows of a site through ``fn(rows, where)``, as ``reading.tap`` does.

    Raises:
        InputError: The site is reached outside of ``generate``, ``stream`` and ``read``, where nobody knows its branch.
    """
    target, ids = edit.target, []

    def on(x: Tensor) -> Tensor:
        run = host.run
        if host._probing:
            return x
        unknown = run is None and not host._reading if target.modality == TEXT else run is None or run.step is None
        if unknown:
            raise InputError(f"site {target} is edited, but the pipeline was called directly: call host.generate.")
        if not edit.holds(run) or (target.modality == TEXT and run is not None and run.branch is None):
            return x  # the latter: inside of the pipeline's call, which was given what we encoded
        tokens = to_tokens(x, target.layout)
        marks = _marks(host, target, tokens, ids)
        keep = None if marks is None or target.tokens == "all" else keep_mask(target.tokens, marks)
        rows = take(tokens.float(), keep, target.pooled)
        new = fn(rows, _where(x, tokens, target, run, keep, marks))
        if new is rows:
            return x
        if new.shape != rows.shape:
            raise InputError(f"the edit at {target} returned shape {tuple(new.shape)}, not {tuple(rows.shape)}.")
        return from_tokens(put(tokens, keep, target.pooled, rows, new), x, target.layout)

    with ExitStack() as stack:
        if target.modality == TEXT and target.has_tokens:
            encoder = host.model.get_submodule(target.module.split(".")[0])
            stack.enter_context(watch_input(encoder, ids))
        stack.enter_context(host._port(target.module, target.io).attach(on))
        yield


def _marks(host: DiffusionHost, target: Target, tokens: Tensor, ids: list[Tensor]) -> Marks | None:
    if not target.has_tokens:
        return None
    if target.modality == TEXT:
        return text_marks(tokens, ids[0], host.tokenizers[target.module.split(".")[0]])
    content = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    return Marks(content, ~content)


def _where(
    x: Tensor, tokens: Tensor, target: Target, run: Run | None, keep: Tensor | None, marks: Marks | None
) -> Where:
    b, t, _ = tokens.shape
    item, branch, step, grid = torch.arange(b), None, None, None
    if run is not None and target.modality == TEXT:
        if b != len(run.items):
            raise InputError(f"site {target}: {b} prompts are encoded for {len(run.items)} images.")
        item = run.items
        branch = None if run.branch is None else torch.full((b,), run.branch)
    elif run is not None:
        item, branch = run.rows(b)
        step = run.step
        if target.layout.ndim == 4:
            grid = tuple(x.movedim((target.layout.batch, target.layout.channel), (0, -1)).shape[1:3])
        elif target.has_tokens:
            grid = run.grid(t)
    item = item.to(x.device)
    branch = None if branch is None else branch.to(x.device)
    if target.pooled or marks is None:
        return Where(item, branch=branch, step=step)
    if keep is None:
        row = torch.arange(b, device=x.device).repeat_interleave(t)
        position, special = torch.arange(t, device=x.device).repeat(b), marks.special.flatten()
    else:
        row, position = keep.nonzero(as_tuple=True)
        special = marks.special[keep]
    branch = None if branch is None else branch[row]
    return Where(item[row], position, special=special, grid=grid, branch=branch, step=step)


class Seen(NamedTuple):
    """What a module is called with and returns, for batches of one and two.

    Attributes:
        inputs: Shapes of its main argument.
        outputs: Shapes of its main output.
        key: Where that is in a returned tuple; None for the first tensor.
    """

    inputs: list[torch.Size]
    outputs: list[torch.Size]
    key: int | None


def recorder(i: int, got: dict[int, Rows], n: int) -> Callable[[Tensor, Where], Tensor]:
    """A function for :func:`tap` that keeps the rows, and stops the forward pass when ``n`` sites are read."""

    def record(rows: Tensor, where: Where) -> Tensor:
        got[i] = Rows(rows.clone(), where.item, where.position, where.special)
        if len(got) == n:
            raise Done
        return rows

    return record
