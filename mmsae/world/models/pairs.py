"""Image-text pairs of any shards, decoded once into memory."""

from __future__ import annotations

import re
from collections.abc import Callable
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from mmsae.errors import InputError
from mmsae.shards import FaultLog, UidSet, expand, read_shard
from mmsae.world.models.options import PairData

_SIDES = re.compile(r"\b(left|right)\b")


class LoadedPairs(NamedTuple):
    """``N`` images with one or more captions each."""

    images: np.ndarray  #: ``(N, S, S, 3) uint8``
    texts: list[str]  #: The ``U`` different captions
    captions: np.ndarray  #: ``(N, C) int64`` indices into ``texts``; rows with fewer captions repeat their first
    counts: np.ndarray  #: ``(N,) int64`` captions of each image
    group: np.ndarray  #: ``(N,) int64`` non-decreasing; equal for neighbours that the data calls a pair
    faults: FaultLog  #: What was wrong with the shards

    def digest(self) -> str:
        """Hash of images and captions: the same data, the same string."""
        h = blake2b(digest_size=16)
        for part in (self.images, self.captions, self.group):
            h.update(np.ascontiguousarray(part).tobytes())
        h.update("\0".join(self.texts).encode())
        return h.hexdigest()

    def said(self) -> str:
        """How many there are."""
        size = f"{self.images.nbytes / 1e6:.0f} MB"
        return f"{len(self.images)} images ({size}) and {len(self.texts)} different captions"


def load_pairs(
    shards: str | list[str],
    image_size: int,
    data: PairData = PairData(),
    *,
    keep: Callable[[dict[str, Any]], bool] | None = None,
    progress: bool = True,
) -> LoadedPairs:
    """Decode all pairs of some shards, once, into memory; ``keep`` says of a sample's ``json`` whether it is wanted.

    An image whose shorter side is not ``image_size`` is resized (bicubic) and cut to its middle, as open_clip does. A
    sample with a list ``captions`` in its ``json`` has all of those; else the one that every reader sees. Neighbours
    with the same ``pair`` in their ``json`` stay together.

    Raises:
        InputError: No shard matches, no sample is left, too much data, too many faults, or a uid twice.
    """
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

    fit = Compose([Resize(image_size, InterpolationMode.BICUBIC), CenterCrop(image_size)])
    limit = round(data.max_gigabytes * 1e9 / (3 * image_size**2))
    faults, text_ids = FaultLog(), {}
    images, rows, groups, last = [], [], [], None
    paths = expand(shards)
    with UidSet() as uids:
        for path in tqdm(paths, desc="reading shards", disable=not progress, leave=False):
            for s in read_shard(path, faults, caption_field=data.caption_field):
                uids.add(s.uid, s.shard, s.key)
                if keep and not keep(s.meta):
                    continue
                if len(images) == limit:
                    raise InputError(
                        f"{shards} has more than the {limit} images of {image_size} x {image_size} that fit into"
                        f" {data.max_gigabytes:g} GB: give fewer shards, a smaller image size or a higher limit"
                    )
                several = [] if data.caption_field else s.meta.get("captions") or []
                captions = [c.strip() for c in several if isinstance(c, str) and c.strip()] or [s.caption]
                image = s.image if s.image.size == (image_size, image_size) else fit(s.image)
                images.append(np.asarray(image))
                rows.append([text_ids.setdefault(c, len(text_ids)) for c in captions])
                pair = s.meta.get("pair")
                groups.append((groups[-1] if groups else 0) + (pair is None or pair != last))
                last = pair
            faults.check(data.fault_limit)
    faults.check(data.fault_limit, final=True)
    if len(images) < 2:
        wanted = "readable pairs of the wanted kind" if keep else "readable pairs"
        raise InputError(f"{shards} holds {len(images)} {wanted}: at least 2 are needed")
    widest = max(map(len, rows))
    return LoadedPairs(
        images=np.stack(images),
        texts=list(text_ids),
        captions=np.array([r + r[:1] * (widest - len(r)) for r in rows]),
        counts=np.array([len(r) for r in rows]),
        group=np.array(groups),
        faults=faults,
    )


def speak_of_sides(texts: list[str]) -> bool:
    """Whether a caption speaks of left or right, so that images must not be mirrored."""
    return any(_SIDES.search(t.lower()) for t in texts)


def epoch_order(group: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """``(N,)`` sample indices in a new order, members of a group side by side."""
    rng = np.random.default_rng([seed, 10, epoch])
    rank = rng.permutation(int(group[-1]) + 1)[group]
    return np.argsort(rank, kind="stable")


def flip_and_shift(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Photographs ``(B, S, S, 3)``, half of them mirrored, each moved by up to a tenth of its side (edges repeat)."""
    n, s = images.shape[:2]
    shift = rng.integers(-(s // 10), s // 10 + 1, size=(2, n, 1))
    y, x = np.clip(np.arange(s) + shift, 0, s - 1)
    x = np.where(rng.random((n, 1)) < 0.5, s - 1 - x, x)
    return images[np.arange(n)[:, None, None], y[:, :, None], x[:, None, :]]
