"""Options of ``mmsae look``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Sight:
    """The SAE, and what it is trained on."""

    site: str = ""
    """Where the host is read. Default: patches late in its image tower (of transformers at four fifths of the
    depth)."""
    latents: int | None = None
    """Latents of the SAE. Default: two per input feature, but at least 50 patches for each; of more, a smaller share is
    of one thing (docs/how-to/interpret.md)."""
    k: int = 8
    """Latents that are on at a patch."""
    steps: int = 1500
    """Training steps, of 512 patches each."""
    seed: int = 0
    """Seed of the training, of its control, and of what is drawn."""
    short_side: int = 320
    """Photographs are made this small on their short side, in pixels."""


@dataclass(frozen=True)
class Seen:
    """What is told of the latents."""

    vocabulary: str = ""
    """File with a word or phrase a line, of which names are chosen where the host has a text tower."""
    images: Literal["show", "blur", "none"] = "show"
    """``show`` images in the browser, ``blur`` them until they are pointed at, or leave them out (``none``)."""
    control: bool = True
    """Whether the same is done with random weights, to be compared with."""
