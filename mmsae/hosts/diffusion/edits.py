"""An edit of a diffusion pipeline that is open: when it holds, and which rows it sees."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmsae.hosts.capture import Picked, places
from mmsae.hosts.diffusion.call_state import CallState
from mmsae.hosts.diffusion.prompts import text_marks
from mmsae.hosts.sites import Target, Where
from mmsae.hosts.tokens import Marks, keep_mask, to_tokens
from mmsae.types import TEXT, InputError


class OpenEdit:
    """An edit that is open.

    Attributes:
        target: The site.
        steps: ``(start, end)`` between which it holds, or None.
        at: Steps of the denoiser at which it does, or None: what is not read is not even copied.
    """

    def __init__(self, target: Target, steps: tuple[int, int] | None = None, at: set[int] | None = None):
        self.target, self.steps, self.at = target, steps, at

    def holds(self, run: CallState | None) -> bool:
        """Whether it does, now."""
        if self.at is not None and run.step not in self.at:
            return False
        if self.steps is None or run is None:
            return True
        if self.target.modality == TEXT:
            return run.active is None or self in run.active
        return self.steps[0] <= run.step < self.steps[1]

    def pick(self, x: Tensor, run: CallState | None, ids: list[Tensor], tokenizer: Any) -> Picked | None:
        """The rows of the site in this call of its module; None where the edit does not hold.

        Args:
            x: The host's tensor.
            run: The call of the pipeline that is under way.
            ids: Token ids behind a text site with tokens.
            tokenizer: That of its text encoder.
        """
        target, text = self.target, self.target.modality == TEXT
        if not self.holds(run) or (text and run is not None and run.branch is None):
            return None  # the latter: inside of the pipeline's call, which was given what we encoded
        tokens = to_tokens(x, target.layout)
        b, t, _ = tokens.shape
        item, branch, step, grid = torch.arange(b), None, None, None
        if run is not None and text:
            if b != len(run.items):
                raise InputError(f"site {target}: {b} prompts are encoded for {len(run.items)} images.")
            item, branch = run.items, None if run.branch is None else torch.full((b,), run.branch)
        elif run is not None:
            (item, branch), step = run.rows(b), run.step
            if target.layout.ndim == 4:
                grid = tuple(x.movedim((target.layout.batch, target.layout.channel), (0, -1)).shape[1:3])
            elif target.has_tokens:
                grid = run.grid(t)
        item, branch = item.to(x.device), None if branch is None else branch.to(x.device)
        if not target.has_tokens:
            return Picked(tokens, Where(item, branch=branch, step=step))
        if text:
            marks = text_marks(tokens, ids[0], tokenizer)
        else:  # every token of the denoiser is content
            content = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
            marks = Marks(content, ~content)
        keep = None if target.tokens == "all" else keep_mask(target.tokens, marks)
        if target.pooled:
            return Picked(tokens, Where(item, branch=branch, step=step), keep, pooled=True)
        row, position = places(tokens, keep)
        special = marks.special.flatten() if keep is None else marks.special[keep]
        branch = None if branch is None else branch[row]
        return Picked(tokens, Where(item[row], position, special=special, grid=grid, branch=branch, step=step), keep)
