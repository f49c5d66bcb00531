"""The generated world as webdataset shards, readable like any other image-text set."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from mmsae.shards import ShardWriter
from mmsae.world.generator.data import WorldData, generate


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
    """Generate samples and write them as ``out/PREFIX-NNNNNN.tar`` with the keys png, txt (full caption) and json.

    Args:
        out: Folder of the shards; made where missing.
        n: Number of samples.
        seed: Everything follows from it: the same arguments write the same bytes.
        prefix: First part of the shard names and of the keys.
        siblings: Whether samples come in pairs that differ in one attribute, see
            :func:`mmsae.world.generator.data.generate`.
        per_shard: Samples a shard; keep it even, so that siblings lie in one shard.
        compress: Write ``.tar.gz``, about a third of the size.
        progress: Show a progress bar.

    Returns:
        What was written.
    """
    data = generate(n, seed, siblings=siblings)
    with ShardWriter(out, prefix, per_shard=per_shard, compress=compress) as writer:
        for i in tqdm(range(n), desc=f"writing {prefix}", disable=not progress, leave=False):
            png = io.BytesIO()
            Image.fromarray(data.images[i]).save(png, "PNG", compress_level=1)
            writer.write(f"{prefix}-{i:07d}", {"png": png.getvalue(), "txt": data.full[i], "json": data.meta(i)})
    return data
