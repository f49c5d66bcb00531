"""What some hosts do beyond reading and editing, for code that needs that of any host: ask with ``isinstance``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from mmsae.types import ImageTextBatch, Site


@runtime_checkable
class Generates(Protocol):
    """Makes images of texts, step by step."""

    def generate(self, prompts: str | Sequence[str], **options: Any) -> Tensor:
        """``(B, 3, H, W)`` images; edits that are open hold."""

    def edit(
        self, site: Site | str, fn: Callable[..., Tensor], *, where: bool, steps: tuple[int, int] | None
    ) -> AbstractContextManager[None]:
        """The context manager of every host, between two steps."""

    def check_consumed(self, site: Site | str) -> Any:
        """Refuse a site that does not reach what makes the image."""


@runtime_checkable
class Answers(Protocol):
    """Answers prompts in which images and text are one sequence."""

    def answer(self, batch: ImageTextBatch, **options: Any) -> list[str]:
        """What it says to each prompt."""

    def sites(self, spec: str) -> dict[str, Site]:
        """``{modality: its tokens}`` at a module."""
