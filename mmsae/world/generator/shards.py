"""Generated images as webdataset shards, readable like any other image-text set."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from mmsae.shards import ShardWriter
from mmsae.world.generator.data import WorldData, generate


def write_samples(
    out: str | Path,
    prefix: str,
    images: np.ndarray,
    texts: Iterable[str],
    metas: Iterable[dict[str, Any]],
    *,
    per_shard: int = 1000,
    digits: int = 6,
    compress: bool = False,
    progress: bool = False,
) -> None:
    """Write images as ``out/PREFIX-NNNNNN.tar`` with the keys png, txt and json; equal images give equal bytes.

    Args:
        out: Folder of the shards; made where missing.
        prefix: First part of the shard names and of the keys.
        images: ``(n, H, W, 3) uint8``.
        texts: Caption of each.
        metas: Json of each.
        per_shard: Samples a shard.
        digits: Digits of the number in a key.
        compress: Write ``.tar.gz``, about a third of the size.
        progress: Show a progress bar.
    """
    rows = zip(images, texts, metas, strict=True)
    with ShardWriter(out, prefix, per_shard=per_shard, compress=compress) as writer:
        bar = tqdm(rows, desc=f"writing {prefix}", total=len(images), disable=not progress, leave=False)
        for i, (image, text, meta) in enumerate(bar):
            png = io.BytesIO()
            Image.fromarray(image).save(png, "PNG", compress_level=1)
            writer.write(f"{prefix}-{i:0{digits}d}", {"png": png.getvalue(), "txt": text, "json": meta})


def write_world(
    out: str | Path,
    n: int,
    seed: int = 1,
    prefix: str = "world",
    *,
    siblings: bool = True,
    per_shard: int = 1000,
    compress: bool = False,
    progress: bool = True,
) -> WorldData:
    """Generate samples (:func:`~mmsae.world.generator.data.generate`) and write them with their full captions.

    The same arguments write the same bytes; see :func:`write_samples` for the rest of them. Keep ``per_shard`` even, so
    that siblings lie in one shard. Returns what was written.
    """
    data = generate(n, seed, siblings=siblings)
    write_samples(
        out, prefix, data.images, data.full, map(data.meta, range(n)),
        per_shard=per_shard, digits=7, compress=compress, progress=progress,
    )  # fmt: skip
    return data
