"""What evidence needs of a sample beside the host's inputs: class name, thumbnail, where the host looks, signature.

It is made where images are decoded, in the workers, and travels among the inputs of a batch.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmsae.interpret.evidence.view import Views
from mmsae.shards import Reader, Sample
from mmsae.types import ImageTextBatch

PREFIX = "evidence."
CELLS = 16  # signature of an image: its mean colours in so many cells a side


class SampleMarks(NamedTuple):
    """What is known of the B samples of a batch."""

    label: list[str]  #: Class names, empty where there is none
    thumbnail: list[bytes]  #: Small images, empty where a sample has none
    view: Tensor  #: ``(B, 4) float32``, see :class:`mmsae.interpret.evidence.folder.Items`
    dhash: Tensor  #: ``(B,) int64`` difference hash of the image, 0 where there is none
    signature: Tensor  #: ``(B, CELLS, CELLS, 3) uint8`` mean colours
    has_image: Tensor  #: ``(B,) uint8``
    text: Tensor  #: ``(B,) int64`` hash of the caption as it reads without case, punctuation and spaces; 0: no caption
    #: What another host, which embeds, takes of the batch.
    images: Tensor | None = None
    texts: Tensor | None = None

    @classmethod
    def take(cls, batch: ImageTextBatch) -> tuple[SampleMarks, ImageTextBatch]:
        """The marks of a batch of :class:`MarkingCollate`, and the batch without them."""
        inputs = dict(batch.inputs or {})
        own = {k.removeprefix(PREFIX): inputs.pop(k) for k in list(inputs) if k.startswith(PREFIX)}
        label = [b.decode() for b in _cut(own.pop("label"), own.pop("label_size"))]
        thumbnail = _cut(own.pop("thumbnail"), own.pop("thumbnail_size"))
        return cls(label, thumbnail, **own), batch._replace(inputs=inputs or None)


class MarkingCollate:
    """A host's batches, with :class:`SampleMarks`.

    Args:
        reading: The host's ``transform``, ``tokenize`` and ``collate``.
        views: Where the host looks in an image.
        need: What a sample must have.
        pixels: Longer side of thumbnails.
        label: Field of json with the class name.
        other: ``transform`` and ``tokenize`` of another host that embeds.
    """

    def __init__(
        self,
        reading: dict[str, Any],
        views: Views,
        need: Sequence[str],
        pixels: int,
        label: str = "",
        other: dict[str, Any] | None = None,
    ) -> None:
        self.reading, self.views, self.need = reading, views, tuple(need)
        self.pixels, self.label, self.other = pixels, label, other

    def __call__(self, samples: Sequence[Sample]) -> ImageTextBatch:
        collate = self.reading["collate"]
        batch = _plain(self.reading, samples) if collate is None else collate(list(samples))
        marks = self._marks(samples)
        if self.other is not None:
            other = _plain(self.other, samples)
            marks |= {k: v for k, v in (("images", other.images), ("texts", other.texts)) if v is not None}
        inputs = {**(batch.inputs or {}), **{PREFIX + k: v for k, v in marks.items()}}
        return batch._replace(inputs=inputs)

    def _marks(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        images = [s.image if isinstance(s.image, Image.Image) else None for s in samples]
        labels = [label_of(s, self.label).encode() for s in samples]
        made = image_marks(images, self.views, self.pixels)
        small = made.pop("thumbnail")
        return made | {
            "label": _bytes(labels),
            "label_size": torch.tensor([len(b) for b in labels], dtype=torch.int32),
            "thumbnail": _bytes(small),
            "thumbnail_size": torch.tensor([len(b) for b in small], dtype=torch.int32),
            "text": torch.tensor([text_hash(s.caption) for s in samples], dtype=torch.int64),
        }


def image_marks(images: Sequence[Image.Image | None], views: Views, pixels: int) -> dict[str, Any]:
    """The fields of :class:`SampleMarks` that are of images, where there are some."""
    return {
        "thumbnail": [b"" if i is None else shrunk(i, pixels) for i in images],
        "view": torch.tensor([(0.0, 0.0, 1.0, 1.0) if i is None else views(*i.size) for i in images]),
        "dhash": torch.tensor([0 if i is None else difference_hash(i) for i in images], dtype=torch.int64),
        "signature": torch.stack([mean_colours(i) for i in images]),
        "has_image": torch.tensor([i is not None for i in images], dtype=torch.uint8),
    }


def _plain(reading: dict[str, Any], samples: Sequence[Sample]) -> ImageTextBatch:
    transform: Callable | None = reading["transform"]
    made = [None if transform is None else transform(s.image) for s in samples]
    reader = Reader(transform, reading["tokenize"], len(samples), ())
    return reader.stack(list(zip(samples, made, strict=True)))


def label_of(sample: Sample, field: str = "") -> str:
    """The class name of a sample: json's ``field``; where none is named ``class``, or else the number in ``cls``."""
    said = sample.meta.get(field or "class")
    if isinstance(said, (str, int, float)):
        return str(said)
    return "" if field or sample.cls is None else str(sample.cls)


def shrunk(image: Image.Image, pixels: int) -> bytes:
    """An image whose longer side is at most ``pixels``, as WebP."""
    out, small = io.BytesIO(), image.copy()
    small.thumbnail((pixels, pixels), Image.Resampling.LANCZOS)
    small.save(out, "webp", quality=80, method=2)
    return out.getvalue()


def mean_colours(image: Image.Image | None) -> Tensor:
    """``(CELLS, CELLS, 3) uint8`` mean colours of an image in cells of equal size; zeros where there is none."""
    if image is None:
        return torch.zeros(CELLS, CELLS, 3, dtype=torch.uint8)
    return torch.from_numpy(np.array(image.resize((CELLS, CELLS), Image.Resampling.BOX)))


def difference_hash(image: Image.Image) -> int:
    """The 64 bits of dHash: whether each of 8 x 8 cells of the grey image is brighter than its right neighbour."""
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX)).astype(np.int16)
    return int.from_bytes(np.packbits(grey[:, :-1] > grey[:, 1:]).tobytes(), "big", signed=True)


def text_hash(caption: str) -> int:
    """64 bits that are equal where captions are, but for case, punctuation and spaces; 0 where there is no word."""
    words = "".join(c if c.isalnum() else " " for c in caption.casefold()).split()
    digest = blake2b(" ".join(words or [caption.strip()]).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True) if caption.strip() else 0


def _bytes(parts: Sequence[bytes]) -> Tensor:
    return torch.frombuffer(bytearray(b"".join(parts) or b"\0"), dtype=torch.uint8)


def _cut(joined: Tensor, sizes: Tensor) -> list[bytes]:
    raw, ends = joined.numpy().tobytes(), sizes.cumsum(0).tolist()
    return [raw[e - n : e] for e, n in zip(ends, sizes.tolist(), strict=True)]
