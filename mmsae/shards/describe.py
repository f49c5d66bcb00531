"""What is in a set of shards, from the tar headers and a few samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import islice
from typing import Any

from mmsae.shards.decode import find_image
from mmsae.shards.faults import FaultLog
from mmsae.shards.groups import groups
from mmsae.shards.read import read_shard
from mmsae.shards.shard import shard_name, shard_size
from mmsae.shards.sources import expand
from mmsae.shards.uid_list import UidList

MOST_KEYS = 30
"""Fields that are shown; names with dots give as many as there are samples."""


def count_samples(
    pattern: str | Sequence[str], progress: bool = False, keep: UidList | None = None, source: str = ""
) -> int:
    """Number of samples in the shards, by their headers (good or bad; a plain tar is not read, a packed one is).

    With ``keep`` it is of those whose uid is listed, and every shard is read; ``source`` is part of uids made here.
    """
    paths = _bar(expand(pattern), progress)
    if keep is None:
        return sum(1 for path in paths for _ in groups(path, FaultLog(), read=False))
    about = {"need": (), "decode": False, "source": source, "keep": keep}
    return sum(1 for path in paths for _ in read_shard(path, FaultLog(), **about))


def describe(
    pattern: str | Sequence[str], *, examples: int = 5, max_shards: int | None = None, progress: bool = False
) -> dict[str, Any]:
    """What ``mmsae info`` shows of shards.

    Args:
        pattern: See ``expand``.
        examples: Captions to show; as many samples of the first shards are decoded for the sizes of their images.
        max_shards: Go through the headers of at most so many shards, evenly spread, and scale up the rest.
        progress: Whether to show a progress bar.

    Returns:
        ``kind, pattern, shards, first, last, bytes, samples, exact`` (False: ``samples`` is scaled up from
        ``shards_read``), ``samples_per_shard {min, mean, max}``, ``keys {field: samples that have it}``,
        ``mean_bytes {field: bytes a sample}``, ``json_fields, captions, image_sizes [[width, height]]``, ``faults``
        (what the headers and the decoded samples show; a full check needs a full read).
    """
    paths = expand(pattern)
    step = -(-len(paths) // max_shards) if max_shards else 1
    chosen = paths[::step]
    faults, per_shard, keys, sizes = FaultLog(), [], Counter(), Counter()
    for path in _bar(chosen, progress):
        per_shard.append(0)
        for group in groups(path, faults, read=False):
            per_shard[-1] += 1
            faults.seen()
            keys.update(group.sizes.keys())
            sizes.update(group.sizes)
            _judge(group.sizes, faults, shard_name(path), group.key)
    mean = round(sum(per_shard) / len(per_shard), 1)
    all_bytes = sum(shard_size(p) for p in paths)
    scale = all_bytes / max(sum(shard_size(p) for p in chosen), 1)
    shown = list(islice((s for p in chosen for s in read_shard(p, FaultLog(), need=())), examples))
    return {
        "kind": "shards",
        "pattern": pattern if isinstance(pattern, str) else list(pattern),
        "shards": len(paths),
        "first": paths[0],
        "last": paths[-1],
        "bytes": all_bytes,
        "samples": sum(per_shard) if step == 1 else round(sum(per_shard) * scale),
        "exact": step == 1,
        "shards_read": len(chosen),
        "samples_per_shard": {"min": min(per_shard), "mean": mean, "max": max(per_shard)},
        "keys": dict(keys.most_common(MOST_KEYS)),
        "mean_bytes": {k: round(sizes[k] / n) for k, n in keys.most_common(MOST_KEYS)},
        "json_fields": sorted({field for s in shown for field in s.meta}),
        "captions": [s.caption for s in shown],
        "image_sizes": _image_sizes(chosen, examples),
        "faults": faults.to_dict(),
    }


def _image_sizes(paths: Sequence[str], n: int) -> list[list[int]]:
    samples = (s for p in paths for s in read_shard(p, FaultLog(), need=("image",)))
    return [list(size) for size in sorted({s.image.size for s in islice(samples, n)})]


def _judge(sizes: dict[str, int], faults: FaultLog, shard: str, key: str) -> None:
    """What the sizes alone tell; a ``json`` may hold the caption."""
    image = find_image(sizes)
    if image is None:
        faults.add("missing_image", shard, key)
    elif not sizes[image]:
        faults.add("broken_image", shard, key, "0 bytes")
    elif "txt" not in sizes and "json" not in sizes:
        faults.add("missing_caption", shard, key)
    elif sizes.get("txt") == 0:
        faults.add("empty_caption", shard, key)


def _bar(paths: Sequence[str], progress: bool) -> Any:
    from tqdm import tqdm

    return tqdm(paths, desc="reading headers", unit="tar", disable=not progress)
