"""Where on a host: site specs, what they mean there, and which rows an edit sees.

A spec is a virtual endpoint (``image.embed``, ``text.pooled``) or ``MODULE.PATH:io[tokens]`` in the host's own naming.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from torch import Tensor

from mmsae.hosts.tokens import Layout
from mmsae.types import InputError

_SPEC = re.compile(r"(?P<module>[\w.]+)(?::(?P<io>\w+))?(?:\[(?P<tokens>\w+)\])?")


class Target(NamedTuple):
    """A site spec, resolved on one host."""

    module: str  #: Module path or virtual endpoint.
    io: str  #: ``in``, ``out`` or ``update``.
    tokens: str  #: Token policy.
    modality: str  #: ``image`` or ``text``.
    layout: Layout  #: What the host's tensor looks like.

    @property
    def has_tokens(self) -> bool:
        """Whether the host's tensor has a token axis."""
        return self.layout.ndim > 2

    @property
    def pooled(self) -> bool:
        """Whether there is one row per item."""
        return self.tokens == "pooled"

    def __str__(self) -> str:
        return f"{self.module}:{self.io}[{self.tokens}]"


def parse_site(spec: str) -> tuple[str, str, str | None]:
    """Module, io and token policy (None where none is named) of a spec."""
    match = _SPEC.fullmatch(spec)
    if not match:
        raise InputError(f"site {spec!r} is not of the form MODULE.PATH:io[tokens] or MODALITY.embed.")
    io = match["io"] or "out"
    if io not in ("in", "out", "update"):
        raise InputError(f"site {spec!r}: io {io!r} is not one of in, out, update.")
    return match["module"], io, match["tokens"]


UNCOND, COND = 0, 1  # the guidance branches of a diffusion pipeline


class Where(NamedTuple):
    """Which rows of which call an edit sees."""

    #: ``(N,)`` row of the batch (of batch times beams while beams are searched; of the prompts in a pipeline).
    item: Tensor
    #: ``(N,)`` which token: place in the item's own sequence, padding not counted in language models, row by row in
    #: maps; None for pooled sites and means.
    position: Tensor | None = None
    image: Tensor | None = None  #: ``(N,) bool``, image tokens, where one sequence holds image and text; else None.
    #: ``(N,) bool``, class, register, BOS, EOS, padding or template tokens; None for pooled sites and means.
    special: Tensor | None = None
    start: int = 0  #: Tokens in the cache of a language model: 0 at the beginning of a prompt and on all other hosts.
    #: Tokens of the prompt in a language model; None where that is not known and several tokens come onto a cache,
    #: which a piece of a prompt and tokens on trial both do.
    prompt: int | None = 0
    #: ``(H, W)`` where the tokens are the cells of a map, and ``position`` is ``y * W + x``.
    grid: tuple[int, int] | None = None
    branch: Tensor | None = None  #: ``(N,)`` :data:`COND` or :data:`UNCOND`, in a diffusion pipeline; else None.
    #: Which step of a generation is under way, counted from 0; None outside of one (text encoders too).
    step: int | None = None
    #: ``(N,) uint8``, places in :data:`mmsae.types.ROLES`: what the tokens of a conversation are; else None.
    role: Tensor | None = None

    def prefill(self) -> bool:
        """Whether the call reads the prompt (as it always is on hosts that do not decode) or what was generated.

        Where that cannot be told, it raises InputError.
        """
        if self.start and self.prompt is None:
            raise InputError(
                f"several tokens at once come onto a cache of {self.start}, and whether they are the prompt's or were "
                "generated cannot be told: run the model through the host's generate()."
            )
        return self.start < max(1, self.prompt or 0)
