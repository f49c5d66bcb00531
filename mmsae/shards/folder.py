"""Loose image files of a folder as units of a fixed number of files, in the order of their names."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

from mmsae.shards.faults import FaultLog
from mmsae.shards.group import Group
from mmsae.shards.names import is_hidden, valid_name
from mmsae.shards.shard import SUFFIXES, Found, ImageFile, Shard

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
"""Ends of the names of images that are read, in any case."""
OTHER_ENDINGS = (".heic", ".heif", ".tif", ".tiff", ".avif", ".cr2", ".nef", ".arw", ".dng")
"""Ends of the names of images that are not."""
PASSED_OVER = OTHER_ENDINGS + tuple(s for s in SUFFIXES if s.count(".") == 1)
FILES = 1000
"""Images of a unit."""


class Listing(NamedTuple):
    """The images of a folder and of the folders below it."""

    images: list[ImageFile]  #: In the order of their names.
    passed_over: dict[str, int]  #: ``{ending: number}`` of images in formats that are not read, and of shards.


def list_images(folder: str | Path) -> Listing:
    """All images of a folder and the folders below it, with what lies beside them; hidden ones are passed over.

    The caption of ``a/b.jpg`` is in ``a/b.txt``, ``a/b.jpg.txt``, ``a/b.json`` or ``a/b.jpg.json``. Keys have no dots,
    as in shards: ``a/b.c.jpg`` is ``a/b_c``, and where two names become one the ending is added, then a number.
    """
    found: list[tuple[str, int, str, str]] = []
    others: Counter[str] = Counter()
    for place, inner, names in os.walk(folder):
        inner[:] = sorted(d for d in inner if not is_hidden(d))
        within = os.path.relpath(place, folder)
        above = "" if within == "." else within.replace(os.sep, "/") + "/"
        here = set(names)
        for name in names:
            stem, ending = os.path.splitext(name)
            if is_hidden(name) or not ending:
                continue
            others.update([ending.lower()] if ending.lower() in PASSED_OVER else [])
            if ending.lower() not in ENDINGS or not os.path.isfile(path := os.path.join(place, name)):
                continue
            beside = [next((n for n in (stem + e, name + e) if n in here), "") for e in (".txt", ".json")]
            sizes = [os.path.getsize(os.path.join(place, n)) for n in beside if n]
            txt, json_ = (above + n if n else "" for n in beside)
            found.append((above + name, os.path.getsize(path) + sum(sizes), txt, json_))
    found.sort()
    return Listing([ImageFile(n, k, *rest) for (n, *rest), k in zip(found, _keys(found), strict=True)], dict(others))


def _keys(found: Sequence[tuple[str, ...]]) -> list[str]:
    """A key for every name; all differ."""
    plain = [valid_name(os.path.splitext(f[0])[0]).replace(".", "_") for f in found]
    often, taken, keys = Counter(plain), set(), []
    for (name, *_), short in zip(found, plain, strict=True):
        key = short if often[short] == 1 else f"{short}_{os.path.splitext(name)[1][1:].lower()}"
        own, n = key, 2
        while own in taken or (own != short and own in often):
            own, n = f"{key}_{n}", n + 1
        taken.add(own)
        keys.append(own)
    return keys


def folder_units(folder: Shard) -> list[Shard]:
    """The units of a folder of images, of as many files as its ``options`` say under ``files``."""
    files, units = int(folder.options.get("files", FILES)), []
    for at in range(0, len(folder.images), files):
        own = folder.images[at : at + files]
        lines = "".join(f"{i.name}\0{i.size}\0{i.txt}\0{i.json}\n" for i in own)
        tag = blake2b(lines.encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()
        about = {"images": own, "found": Found(sum(i.size for i in own), tag), "name": f"{folder.base}#{at:06d}"}
        units.append(Shard(f"{folder.file}#files={at}-{at + len(own) - 1}", **vars(folder) | about))
    return units


def folder_groups(shard: Shard, faults: FaultLog, read: bool = True) -> Iterator[Group]:
    """The samples of a unit of a folder: image, ``txt`` and ``json`` of each file.

    An image in a folder below, without a ``json``, gets one that holds the folder's name as ``label``. Files that
    cannot be opened are counted as ``broken_image``. Without ``read``, contents are left out.
    """
    for image in shard.images:
        place = {os.path.splitext(image.name)[1][1:].lower(): image.name, "txt": image.txt, "json": image.json}
        place = {field: name for field, name in sorted(place.items()) if name}
        raw, sizes = {}, {}
        try:
            for field, name in place.items():
                path = os.path.join(shard.file, name)
                raw[field] = Path(path).read_bytes() if read else b""
                sizes[field] = len(raw[field]) if read else os.path.getsize(path)
        except OSError as e:
            faults.seen()
            faults.add("broken_image", shard.name, image.key, f"{valid_name(name)} cannot be read: {e.strerror}")
            continue
        label = valid_name(os.path.dirname(image.name))
        if "json" not in raw and label:
            data = json.dumps({"label": label}, ensure_ascii=False).encode()
            raw, sizes = {**raw, "json": data if read else b""}, {**sizes, "json": len(data)}
        if valid_name(image.name) != image.name:
            faults.add("bad_utf8", shard.name, image.key, "the name of its files")
        yield Group(image.key, raw, sizes, {field: field for field in raw}, valid_name(image.name))
