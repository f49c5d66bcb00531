"""Samples of one shard, each with its uid; whatever is wrong with one is counted and survived."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from mmsae.shards.decode import BrokenImage, decode_image, find_caption, find_cls, find_image, parse_json
from mmsae.shards.faults import FaultLog
from mmsae.shards.groups import groups
from mmsae.shards.shard import as_shard
from mmsae.shards.table import check_columns
from mmsae.shards.uid_list import UidList
from mmsae.shards.uid_set import UidSet
from mmsae.shards.uids import group_uid

FROM_JSON = ("missing_json", "missing_caption")
"""Kinds of faults for which a broken json is the reason."""


class Sample(NamedTuple):
    """One sample of a shard."""

    uid: str  #: 32 hex digits.
    key: str  #: webdataset key.
    shard: str  #: Name of the shard (``Shard.name``).
    image: Image.Image | None  #: RGB image, or None where it was not decoded.
    caption: str  #: Stripped caption; empty where the sample has none and none was needed.
    meta: dict[str, Any]  #: The ``json`` field; empty where there is none.
    cls: int | None  #: The ``cls`` field, or None.
    raw: dict[str, bytes]  #: All fields as bytes.


def read_shard(
    path: str | Path,
    faults: FaultLog,
    *,
    need: Collection[str] = ("image", "caption"),
    decode: bool = True,
    source: str = "",
    caption_field: str = "",
    keep: UidList | None = None,
) -> Iterator[Sample]:
    """The good samples of one unit, in its order.

    Args:
        path: A tar, or what ``expand`` gives.
        faults: Counts every sample and what was wrong: ``missing_image``, ``broken_image``, ``missing_caption``,
            ``empty_caption``, ``missing_json``, ``missing_cls`` (only where needed), and what ``groups`` counts; noted
            without dropping the sample: ``broken_json``, ``bad_utf8``.
        need: Which of ``image, caption, question, json, cls`` a sample must have to be kept. ``question``: json's
            ``question``, or else a caption; without a caption the question is its caption.
        decode: Whether to decode the image where it is needed; without, ``with_image`` does it later.
        source: Name of the source, part of the uids made here.
        caption_field: Field of ``json`` that holds the caption, see ``find_caption``; empty: ``txt``, or ``json``'s
            ``caption``.
        keep: The uids that are read; other samples are counted as ``not_in_keep`` and not as seen.

    Yields:
        Samples.

    Raises:
        InputError: A table has no column for what is needed, or ``caption_field`` is not understood.
    """
    unit = as_shard(path)
    shard = unit.name
    if unit.kind == "table":
        check_columns(unit, need, caption_field)
    for group in groups(unit, faults):
        key, raw = group.key, group.raw
        meta, wrong = parse_json(raw["json"]) if "json" in raw else (None, "")
        uid = group_uid(unit, group, meta or {}, source)
        if keep is not None and uid not in keep:
            faults.pass_over()
            continue
        faults.seen()
        caption = find_caption(raw, meta or {}, caption_field, uid)
        if "question" in need and not caption:
            caption = find_caption({}, meta or {}, "question") or caption
        sample = Sample(uid, key, shard, None, caption or "", meta or {}, find_cls(raw), raw)
        if lack := _lack(sample, need, caption is None, meta is None, caption_field):
            faults.add(lack[0], shard, key, f"broken json: {wrong}" if wrong and lack[0] in FROM_JSON else lack[1])
            continue
        if wrong:
            faults.add("broken_json", shard, key, wrong)
        if "\ufffd" in sample.caption or (b"\\u" in raw.get("json", b"") and "\ufffd" in str(meta)):
            faults.add("bad_utf8", shard, key)
        if decode and "image" in need:
            sample = with_image(sample, faults)
        if sample is not None:
            yield sample


def read_shards(paths: Iterable[str | Path], faults: FaultLog, **options: Any) -> Iterator[Sample]:
    """The good samples of several shards of one set, each uid once, for whatever joins by uid; see ``read_shard``.

    Raises:
        InputError: If a uid occurs twice; told after the last sample where there are very many, see :class:`UidSet`.
    """
    with UidSet() as uids:
        for path in paths:
            for sample in read_shard(path, faults, **options):
                uids.add(sample.uid, sample.shard, sample.key)
                yield sample


def _lack(s: Sample, need: Collection[str], no_caption: bool, no_json: bool, field: str) -> tuple[str, str] | None:
    """The first reason to drop the sample, as (kind, detail)."""
    image = find_image(s.raw)
    if "image" in need and image is None:
        return "missing_image", _has(s.raw)
    if "image" in need and not s.raw[image]:
        return "broken_image", f"{image} has 0 bytes"
    if "json" in need and no_json:
        return "missing_json", ""
    text = "caption" in need or "question" in need
    if text and no_caption:
        return "missing_caption", f"no field {field} in json" if field else _has(s.raw)
    if text and not s.caption:
        return "empty_caption", ""
    if "cls" in need and s.cls is None:
        return "missing_cls", ""
    return None


def _has(raw: Mapping[str, bytes], most: int = 6) -> str:
    """The fields of a sample, in a few words."""
    said = ", ".join(f if len(f) <= 40 else f"{f[:40]}..." for f in list(raw)[:most])
    said = f"has {said} and {len(raw) - most} more" if len(raw) > most else f"has {said}"
    return f"{said}; the key ends at the first dot of the file name" if any("." in f for f in raw) else said


def with_image(sample: Sample, faults: FaultLog) -> Sample | None:
    """The sample with its image decoded, or None (and counted as ``broken_image``) where that fails."""
    try:
        return sample._replace(image=decode_image(sample.raw[find_image(sample.raw)]))
    except BrokenImage as e:
        faults.add("broken_image", sample.shard, sample.key, str(e))
        return None
