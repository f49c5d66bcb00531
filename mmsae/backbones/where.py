"""What an edit may ask about the rows that it is given, on any host."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

UNCOND, COND = 0, 1  # the guidance branches of a diffusion pipeline


class Where(NamedTuple):
    """Which rows of which call an edit sees.

    Attributes:
        item: ``(N,)`` row of the batch (of batch times beams while beams are searched; of the prompts in a pipeline).
        position: ``(N,)`` which token: place in the item's own sequence, padding not counted in language models, row by
            row in maps; None for pooled sites and means.
        image: ``(N,) bool``, image tokens, where one sequence holds image and text; else None.
        special: ``(N,) bool``, class, register, BOS, EOS, padding or template tokens; None for pooled sites and means.
        start: Tokens in the cache of a language model: 0 in a prefill and on all other hosts, more while decoding.
        grid: ``(H, W)`` where the tokens are the cells of a map, and ``position`` is ``y * W + x``.
        branch: ``(N,)`` :data:`COND` or :data:`UNCOND`, in a diffusion pipeline; else None.
        step: Which step of a generation is under way, counted from 0; None outside of one (text encoders too).
    """

    item: Tensor
    position: Tensor | None = None
    image: Tensor | None = None
    special: Tensor | None = None
    start: int = 0
    grid: tuple[int, int] | None = None
    branch: Tensor | None = None
    step: int | None = None
