"""Samples of one shard, each with its uid; whatever is wrong with one is counted and survived."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from mmsae.shards.decode import BrokenImage, decode_image, find_caption, find_cls, find_image, parse_json
from mmsae.shards.faults import FaultLog
from mmsae.shards.sources import shard_name
from mmsae.shards.tar import groups
from mmsae.types import ImageTextBatch, InputError

FROM_JSON = ("missing_json", "missing_caption")
"""Kinds of faults for which a broken json is the reason."""

_HEX32 = re.compile(r"[0-9a-fA-F]{32}")


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


def make_uid(source: str, shard: str, key: str, meta: Mapping[str, Any]) -> str:
    """The id of a sample: ``meta["uid"]`` if that is 32 hex digits (DataComp's form), else a hash of where it lies.

    ``shard`` is the tar's name (``Shard.name``), without its folder where the name alone says which it is: moving a
    data set does not change its uids.
    """
    uid = meta.get("uid")
    if isinstance(uid, str) and _HEX32.fullmatch(uid):
        return uid.lower()
    return blake2b("\0".join((source, shard, key)).encode(), digest_size=16).hexdigest()


def draw(uid: str, seed: int = 0) -> float:
    """A number in [0, 1) that depends on uid and seed only."""
    return int.from_bytes(blake2b(f"{seed}/{uid}".encode(), digest_size=6).digest(), "big") / 2**48


class UidSet:
    """The uids of one job; a uid for the second time is refused (about 150 bytes of memory a uid)."""

    def __init__(self) -> None:
        self._shard_of: dict[bytes, int] = {}
        self._shards: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._shard_of)

    def __contains__(self, uid: str) -> bool:
        return bytes.fromhex(uid) in self._shard_of

    def add(self, uid: str, shard: str, key: str) -> None:
        """Remember a uid.

        Raises:
            InputError: If it was there already; names the uid, the key and both shards.
        """
        n = len(self._shard_of)
        first = self._shard_of.setdefault(bytes.fromhex(uid), self._shards.setdefault(shard, len(self._shards)))
        if len(self._shard_of) == n:
            raise InputError(
                f"uid {uid} of key {key} in shard {shard} was already taken by a sample of shard"
                f" {list(self._shards)[first]}: uids must differ, remove one of the two samples."
            )

    def add_batch(self, batch: ImageTextBatch) -> None:
        """Remember the uids of a batch; see :meth:`add`."""
        for row in zip(batch.uids, batch.shards, batch.keys, strict=True):
            self.add(*row)


def read_shard(
    path: str | Path,
    faults: FaultLog,
    *,
    need: Collection[str] = ("image", "caption"),
    decode: bool = True,
    source: str = "",
    caption_field: str = "",
) -> Iterator[Sample]:
    """The good samples of one shard, in its order.

    Args:
        path: A ``.tar`` or ``.tar.gz``.
        faults: Counts every sample and what was wrong: ``missing_image``, ``broken_image``, ``missing_caption``,
            ``empty_caption``, ``missing_json``, ``missing_cls`` (only where needed), and what ``groups`` counts; noted
            without dropping the sample: ``broken_json``, ``bad_utf8``.
        need: Which of ``image, caption, question, json, cls`` a sample must have to be kept. ``question``: json's
            ``question``, or else a caption; without a caption the question is its caption.
        decode: Whether to decode the image where it is needed; without, ``with_image`` does it later.
        source: Name of the source, part of the uids made here.
        caption_field: Field of ``json`` that holds the caption; empty: ``txt``, or ``json``'s ``caption``.

    Yields:
        Samples.
    """
    shard = shard_name(path)
    for key, raw, *_ in groups(path, faults):
        faults.seen()
        meta, wrong = parse_json(raw["json"]) if "json" in raw else (None, "")
        caption = find_caption(raw, meta or {}, caption_field)
        if "question" in need and not caption:
            caption = find_caption({}, meta or {}, "question") or caption
        sample = Sample(
            make_uid(source, shard, key, meta or {}), key, shard, None, caption or "", meta or {}, find_cls(raw), raw
        )
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
        InputError: If a uid occurs twice.
    """
    uids = UidSet()
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
