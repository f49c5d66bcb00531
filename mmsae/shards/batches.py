"""Samples to batches: transform, tokenise, stack. Runs in the workers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from mmsae.shards.faults import FaultLog
from mmsae.shards.read import Sample, read_shard, with_image
from mmsae.types import ImageTextBatch, InputError

Transform = Callable[..., Tensor]
Tokenize = Callable[[list[str]], Tensor]
Collate = Callable[[list[Sample]], ImageTextBatch]


class Reader(NamedTuple):
    """How samples become batches; travels to the workers.

    Attributes:
        transform: PIL image to ``(3, H, W)``, the host's own; None for text alone.
        tokenize: Captions to ``(B, L)`` ids, the host's own, which truncates; None for images alone.
        batch_size: Samples a batch.
        need: What a sample must have, see ``read_shard``.
        caption_field: See ``read_shard``.
        collate: Samples with decoded images to a batch, the host's own, in place of ``transform`` and ``tokenize``:
            for hosts whose processor sees image and text together. Faults of its batch are counted as notes.
    """

    transform: Transform | None
    tokenize: Tokenize | None
    batch_size: int
    need: tuple[str, ...]
    caption_field: str = ""
    collate: Collate | None = None

    def samples(self, source: str, path: str, faults: FaultLog) -> Iterator[Sample]:
        """Samples of one shard, images not yet decoded (so that a shuffle buffer holds compressed bytes)."""
        return read_shard(path, faults, need=self.need, decode=False, source=source, caption_field=self.caption_field)

    def batches(
        self, samples: Iterable[Sample], faults: FaultLog, give_up: int | None = None
    ) -> Iterator[ImageTextBatch]:
        """Full batches and a last smaller one; each takes the faults counted while it was made.

        Raises:
            InputError: If ``give_up`` images in a row cannot be decoded (an endless stream would never give a batch).
        """
        ready = self._ready(samples, faults, give_up)
        while rows := list(islice(ready, self.batch_size)):
            yield self._stack(rows, faults)

    def _ready(
        self, samples: Iterable[Sample], faults: FaultLog, give_up: int | None
    ) -> Iterator[tuple[Sample, Tensor | None]]:
        broken = 0
        for sample in samples:
            decoded = with_image(sample, faults) if "image" in self.need else sample
            if decoded is None:
                broken += 1
                if broken == give_up:
                    raise InputError(f"{broken} images in a row could not be decoded: {faults.summary()}")
            elif self.collate is not None:
                broken = 0
                yield decoded._replace(raw={}), None
            else:
                broken = 0
                image = None if self.transform is None else self.transform(decoded.image)
                yield decoded._replace(image=None, raw={}), image

    def _stack(self, rows: list[tuple[Sample, Tensor | None]], faults: FaultLog) -> ImageTextBatch:
        samples = [sample for sample, _ in rows]
        if self.collate is not None:
            batch = self.collate(samples)
            faults.merge(batch.faults)
            return batch._replace(faults=faults.take())
        captions = [s.caption for s in samples]
        texts = None
        if self.tokenize is not None:
            texts = self.tokenize(captions)
            for i in long_captions(self.tokenize, captions, texts):
                faults.add("long_caption", samples[i].shard, samples[i].key, f"more than {texts.shape[1]} tokens")
        return ImageTextBatch(
            None if self.transform is None else torch.stack([image for _, image in rows]),
            texts,
            [s.uid for s in samples],
            captions,
            [s.key for s in samples],
            [s.shard for s in samples],
            faults.take(),
        )


def long_captions(tokenize: Tokenize, captions: list[str], ids: Tensor) -> list[int]:
    """Which captions the tokenizer cut, as far as it can tell.

    Args:
        tokenize: Captions to ids. Where it has a method ``too_long(list[str]) -> list[bool]``, as the tokenizers of
            ``mmsae.backbones`` do, that is asked about the rows that are full; without, nothing is reported.
        captions: ``B`` captions.
        ids: ``(B, L)``, the tokenised captions.

    Returns:
        Indices of the captions that are longer than L tokens.
    """
    if not hasattr(tokenize, "too_long"):
        return []
    full = (ids[:, -2:-1] != ids[:, -1:]).any(1).nonzero()[:, 0].tolist()  # a shorter row ends in equal padding
    flags = tokenize.too_long([captions[i] for i in full]) if full else []
    return [i for i, long in zip(full, flags, strict=True) if long]
