"""Samples to batches: transform, tokenise, stack. Runs in the workers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from mmsae.errors import out_of_memory
from mmsae.shards.decode import find_image
from mmsae.shards.faults import FaultLog
from mmsae.shards.read import Sample, read_shard, with_image
from mmsae.shards.uid_list import UidList
from mmsae.types import ImageTextBatch, InputError

Transform = Callable[..., Tensor]
Tokenize = Callable[[list[str]], Tensor]
Collate = Callable[[list[Sample]], ImageTextBatch]
"""May say in an attribute ``need`` what it reads, see ``read_shard``."""
IF_ANY = "image?"
"""Among what a sample must have: its image is decoded where it has one, and need not be there."""
Row, Made = TypeVar("Row"), TypeVar("Made")


class Reader(NamedTuple):
    """How samples become batches; travels to the workers."""

    #: PIL image to ``(3, H, W)``, the host's own; None for text alone. Where it says ``ragged``, to ``(H, W, 3)`` of a
    #: size of its own, and a batch holds ``inputs``: ``pixels``, all in one row, and ``sizes (B, 2)``.
    transform: Transform | None
    tokenize: Tokenize | None  #: Captions to ``(B, L)`` ids, the host's own, which truncates; None for images alone.
    batch_size: int  #: Samples a batch.
    need: tuple[str, ...]  #: What a sample must have, see ``read_shard``.
    caption_field: str = ""  #: See ``read_shard``.
    #: Samples with decoded images to a batch, the host's own, in place of ``transform`` and ``tokenize``: for hosts
    #: whose processor sees image and text together. Faults of its batch are counted as notes.
    collate: Collate | None = None
    keep: UidList | None = None  #: The uids that are read, see ``read_shard``; None: all.

    @classmethod
    def of(
        cls,
        transform: Transform | None,
        tokenize: Tokenize | None,
        batch_size: int,
        need: Collection[str] | None = None,
        caption_field: str = "",
        collate: Collate | None = None,
        keep: UidList | None = None,
    ) -> Reader:
        """A reader that needs what is transformed and tokenised, or what the collate says in ``need``, by default."""
        if need is None and collate is not None:
            need = getattr(collate, "need", ("image", "caption"))
        elif need is None:
            need = [n for n, made_by in (("image", transform), ("caption", tokenize)) if made_by is not None]
        return cls(transform, tokenize, batch_size, tuple(need), caption_field, collate, keep)

    def samples(self, source: str, path: str, faults: FaultLog) -> Iterator[Sample]:
        """Samples of one shard, images not yet decoded (so that a shuffle buffer holds compressed bytes)."""
        about = {"caption_field": self.caption_field, "keep": self.keep}
        return read_shard(path, faults, need=self.need, decode=False, source=source, **about)

    def batches(
        self, samples: Iterable[Sample], faults: FaultLog, give_up: int | None = None
    ) -> Iterator[ImageTextBatch]:
        """Full batches and a last smaller one; each takes the faults counted while it was made.

        Where the host refused as many samples as make a batch, one without samples tells the faults so far.

        Raises:
            InputError: If ``give_up`` samples in a row cannot be used (an endless stream would never give a batch).
        """
        ready, rows, lost = self._ready(samples, faults, give_up), [], 0
        while rows := rows + list(islice(ready, self.batch_size - len(rows))):
            batch, good = tried(self.stack, rows, faults, lambda row: place(row[0]))
            lost = 0 if good else lost + len(rows)
            if give_up is not None and lost >= give_up:
                raise InputError(f"{lost} samples in a row were refused by the host: {faults.drops()}")
            if batch is None and not good:
                batch = ImageTextBatch(None, None, [], [], [], [])
            if batch is not None:
                faults.merge(batch.faults)
                yield batch._replace(faults=faults.take())
            rows = good if batch is None else []

    def _ready(
        self, samples: Iterable[Sample], faults: FaultLog, give_up: int | None
    ) -> Iterator[tuple[Sample, Tensor | None]]:
        broken = 0
        for sample in samples:
            wants = "image" in self.need or (IF_ANY in self.need and find_image(sample.raw) is not None)
            decoded = with_image(sample, faults) if wants else sample
            if decoded is not None and self.collate is None and self.transform is not None:
                image, good = tried(lambda row: self.transform(row[0].image), [decoded], faults, place)
            else:
                image, good = None, [decoded] * (decoded is not None)
            broken = 0 if good else broken + 1
            if broken == give_up:
                raise InputError(f"{broken} images in a row could not be used: {faults.drops()}")
            for row in good:
                yield row._replace(image=row.image if self.collate is not None else None, raw={}), image

    def stack(self, rows: Sequence[tuple[Sample, Tensor | None]]) -> ImageTextBatch:
        """A batch of samples, each with what the transform made of its image."""
        samples = [sample for sample, _ in rows]
        if self.collate is not None:
            return self.collate(samples)
        captions, notes = [s.caption for s in samples], FaultLog()
        texts = None
        if self.tokenize is not None:
            texts = self.tokenize(captions)
            for i in long_captions(self.tokenize, captions, texts):
                notes.add("long_caption", samples[i].shard, samples[i].key, f"more than {texts.shape[1]} tokens")
        made, images, inputs = [image for _, image in rows], None, None
        if getattr(self.transform, "ragged", False):  # images that are resized later, on the host's device
            sizes = torch.tensor([image.shape[:2] for image in made])
            inputs = {"pixels": torch.cat([image.flatten() for image in made]), "sizes": sizes}
        elif self.transform is not None:
            images = torch.stack(made)
        uids, keys, shards = ([getattr(s, f) for s in samples] for f in ("uid", "key", "shard"))
        labels = torch.tensor([s.cls for s in samples]) if "cls" in self.need else None
        return ImageTextBatch(images, texts, uids, captions, keys, shards, notes.take(), inputs, labels)


def place(sample: Sample) -> tuple[str, str]:
    """Shard and key."""
    return sample.shard, sample.key


def tried(
    make: Callable[[list[Row]], Made], rows: Sequence[Row], faults: FaultLog, where: Callable[[Row], tuple[str, str]]
) -> tuple[Made | None, list[Row]]:
    """``(made, rows)``: what a host's own code makes of some rows; else ``(None, those that it takes)``.

    Whatever a transform, tokenizer or processor raises about one row is a fault of that row, ``refused_by_host``. Rows
    that are taken one by one and not together are nobody's fault: that error is raised.

    Args:
        make: Calls the host's code.
        rows: Samples, or what belongs to each.
        faults: Counts those that are refused, with the first line of the reason.
        where: Shard and key of a row.
    """
    try:
        return make(list(rows)), list(rows)
    except MemoryError:
        raise
    except Exception as error:  # the code is the host's, and so are its errors
        if out_of_memory(error):  # which is no fault of a row's
            raise
        good = []
        for row in rows:
            if (reason := _refusal(make, row) if len(rows) > 1 else _first_line(error)) is None:
                good.append(row)
            else:
                faults.add("refused_by_host", *where(row), reason)
        if len(good) == len(rows):
            raise
        return None, good


def taken(
    make: Callable[[list[Row]], Made], rows: Sequence[Row], faults: FaultLog, where: Callable[[Row], tuple[str, str]]
) -> tuple[Made | None, list[Row]]:
    """What a host's own code makes of those of some rows that it takes, and those; see ``tried``."""
    made = None
    while rows and made is None:
        made, rows = tried(make, rows, faults, where)
    return made, list(rows)


def _refusal(make: Callable[[list[Row]], Any], row: Row) -> str | None:
    try:
        make([row])
    except Exception as error:
        return _first_line(error)
    return None


def _first_line(error: Exception) -> str:
    said = (str(error).strip().splitlines() or [""])[0][:200]
    return said if isinstance(error, InputError) else f"{type(error).__name__}: {said}"


def long_captions(tokenize: Tokenize, captions: list[str], ids: Tensor) -> list[int]:
    """Indices of the captions (``ids`` are ``(B, L)``) that the tokenizer cut to L tokens, as far as it can tell.

    Where it has a method ``too_long(list[str]) -> list[bool]``, as the tokenizers of ``mmsae.hosts`` do, that is asked
    about the rows that are full; without, nothing is reported.
    """
    if not hasattr(tokenize, "too_long"):
        return []
    full = (ids[:, -2:-1] != ids[:, -1:]).any(1).nonzero()[:, 0].tolist()  # a shorter row ends in equal padding
    flags = tokenize.too_long([captions[i] for i in full]) if full else []
    return [i for i, long in zip(full, flags, strict=True) if long]
