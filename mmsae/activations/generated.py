"""Prompts for a text-to-image host, and its activations while it draws them, as training and validation batches."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from mmsae.files import lines_of, read_text
from mmsae.hosts import Host
from mmsae.shards import Reader, make_pipeline
from mmsae.types import ImageTextBatch, InputError, Site, Tokens


def read_prompts(source: str | Sequence[str], limit: int = 100_000, caption_field: str = "") -> list[str]:
    """The first ``limit`` distinct prompts of a source, in order.

    It is a ``.txt`` file with one prompt a line, or shards whose captions are the prompts (images are not decoded):
    path, folder, glob or brace pattern, or several.

    Raises:
        InputError: Nothing there, or fewer than two prompts.
    """
    if isinstance(source, str) and source.endswith(".txt"):
        texts: Any = lines_of(read_text(source))
    else:
        reader = Reader.of(None, None, 1024, need=("caption",), caption_field=caption_field)
        pipeline = make_pipeline(source, reader, train=False)
        texts = (c for batch in pipeline for c in batch.captions)
    found: dict[str, None] = {}
    for text in texts:
        if text.strip():
            found[text.strip()] = None
        if len(found) >= limit:
            break
    if len(found) < 2:
        raise InputError(f"prompts: {source} holds {len(found)} different prompts; at least 2 are needed.")
    return list(found)


def split_prompts(prompts: Sequence[str], fraction: float) -> tuple[list[str], list[str]]:
    """``(training, validation)`` prompts, told apart by a hash of their text: the same for every run and seed.

    Validation gets the share ``fraction``; above 0, at least one prompt.
    """
    order = sorted(prompts, key=lambda p: hashlib.blake2b(p.encode(), digest_size=16).digest())
    n = max(1, round(fraction * len(order))) if fraction > 0 else 0
    held = set(order[:n])
    return [p for p in prompts if p not in held], order[:n]


class PromptLoader:
    """Endless batches of prompts, every pass in a new order; ``uids`` are the seeds of their noise.

    ``batch_size`` is that of each rank; ``seed`` holds for orders and noise.
    """

    def __init__(self, prompts: Sequence[str], batch_size: int, seed: int = 0, rank: int = 0, world: int = 1) -> None:
        self.prompts, self.batch_size, self.seed, self.rank, self.world = list(prompts), batch_size, seed, rank, world
        self.batch = 0

    def __iter__(self) -> Iterator[ImageTextBatch]:
        while True:
            first = (self.batch * self.world + self.rank) * self.batch_size
            self.batch += 1
            yield prompt_batch([self._at(i) for i in range(first, first + self.batch_size)], self.seed, first)

    def _at(self, i: int) -> str:
        turn, place = divmod(i, len(self.prompts))
        if getattr(self, "_turn", None) != turn:
            draw = torch.Generator().manual_seed(hash((self.seed, turn)) % 2**63)
            self._turn, self._order = turn, torch.randperm(len(self.prompts), generator=draw).tolist()
        return self.prompts[self._order[place]]

    def state_dict(self) -> dict[str, Any]:
        """How many batches were given."""
        return {"batch": self.batch}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after that batch."""
        self.batch = state["batch"]


def prompt_batch(prompts: list[str], seed: int, first: int) -> ImageTextBatch:
    """Prompts as a batch; the noise of the ``i``-th of a run has a seed that depends on ``(seed, i)`` alone."""
    n = len(prompts)
    seeds = [str(hash((seed, first + i)) % 2**31) for i in range(n)]
    return ImageTextBatch(None, None, seeds, prompts, [""] * n, ["prompts"] * n)


class Generating:
    """A text-to-image host in the place of one that encodes: ``capture`` draws the captions of a batch.

    ``options`` are those of its ``stream``.
    """

    def __init__(self, host: Host, options: Mapping[str, Any]) -> None:
        self.host, self.options = host, dict(options)

    def capture(self, batch: ImageTextBatch, sites: Mapping[str, Site | str]) -> Tokens:
        """Activations while the batch is drawn, each prompt with the noise of its uid."""
        return self.capture_each(batch, {"": sites})[""]

    def capture_each(self, batch: ImageTextBatch, choices: Mapping[str, Mapping[str, Site | str]]) -> dict[str, Tokens]:
        """The same at several choices of sites, drawn once."""
        seeds = [int(u) for u in batch.uids]
        (found,) = self.host.stream_each(batch.captions, choices, seed=seeds, batch_size=len(seeds), **self.options)
        return found


class PromptPass:
    """Every prompt once, in order, with the same noise every time."""

    def __init__(self, prompts: Sequence[str], batch_size: int, seed: int) -> None:
        self.prompts, self.batch_size, self.seed = list(prompts), batch_size, seed

    def __iter__(self) -> Iterator[ImageTextBatch]:
        for first in range(0, len(self.prompts), self.batch_size):
            yield prompt_batch(self.prompts[first : first + self.batch_size], self.seed, first)
