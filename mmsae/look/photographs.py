"""A folder of photographs as shards: loose files of any size become tars of small images, with what is said beside
them.

A unit is a fixed number of files in the order of their names, and one tar, so a killed job goes on with the units that
it lacks. Files that cannot be read are counted and listed.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageOps

from mmsae.errors import InputError
from mmsae.files import read_text, write_json
from mmsae.jobs.estimate import progress_bar
from mmsae.jobs.folder import JobFolder
from mmsae.shards.decode import FORMATS, BrokenImage, to_rgb
from mmsae.shards.faults import FaultLog
from mmsae.shards.folder import ENDINGS, OTHER_ENDINGS, list_images
from mmsae.shards.writer import ShardWriter
from mmsae.types import Faults

PER_TAR = 250
QUALITY = 90
LISTED = "photographs.json"
CAPTION_FIELDS = ("caption", "captions", "text", "description", "title")


class Photograph(NamedTuple):
    """One file."""

    path: Path  #: Where it is
    name: str  #: Its path in the folder, with slashes
    size: int  #: Bytes of the file, and of what lies beside it

    @property
    def folder(self) -> str:
        """The folder that it lies in below the folder of photographs, which may be its class; empty at the top."""
        return self.name.rpartition("/")[0]


class Listing(NamedTuple):
    """The files of a folder."""

    photographs: list[Photograph]  #: In the order of their names
    passed_over: dict[str, int]  #: ``{ending: number}`` of photographs in formats that are not read

    @property
    def identity(self) -> str:
        """A hash of names and sizes: of the photographs, wherever their folder is."""
        lines = "".join(f"{p.name}\0{p.size}\n" for p in self.photographs)
        return hashlib.blake2b(lines.encode("utf-8", "surrogateescape"), digest_size=12).hexdigest()


def list_photographs(folder: str | Path) -> Listing:
    """All images of a folder and the folders below it; hidden ones are passed over.

    Raises:
        InputError: There is no such folder, or no image in it.
    """
    root = Path(folder)
    if not root.is_dir():
        raise InputError(f"{folder} is no folder")
    images, others = list_images(root)
    others = {e: n for e, n in others.items() if e in OTHER_ENDINGS}
    found = [Photograph(root / i.name, i.name, i.size) for i in images]
    if not found:
        seen = "".join(f"; it has {n} {e} files, which are not read" for e, n in others.items())
        raise InputError(f"{folder} has no image ({', '.join(ENDINGS)}){seen}")
    return Listing(found, others)


def write_photographs(
    folder: str | Path, out: str | Path, short_side: int = 320, workers: int | None = None, progress: bool = True
) -> FaultLog:
    """Write the photographs of a folder as shards, ``OUT/photographs-0000-000000.tar`` and so on.

    A sample has the image (turned as its EXIF says, no larger than ``short_side`` on its short side; bytes are kept
    where nothing is to be done), its caption where ``NAME.txt`` or ``NAME.json`` lies beside it, and in its json the
    file's path, its size in pixels and, unless ``NAME.json`` says another, the folder that it lay in as ``class``. Run
    again after a kill, it goes on.

    Returns:
        What was unusable.

    Raises:
        InputError: No image in the folder or none that can be read, or OUT holds the shards of other photographs.
    """
    listing, log = list_photographs(folder), FaultLog()
    job = {"photographs": listing.identity, "n": len(listing.photographs), "short_side": short_side}
    held = JobFolder(out, job, "mmsae look", result=LISTED)
    if held.finished:
        return FaultLog.from_dict(json.loads((Path(out) / LISTED).read_text())["faults"])
    units = [listing.photographs[i : i + PER_TAR] for i in range(0, len(listing.photographs), PER_TAR)]
    with held.lead(), ThreadPoolExecutor(workers or min(8, os.cpu_count() or 1)) as pool:
        with progress_bar("photographs", "image", progress, len(listing.photographs)) as bar:
            for number, unit in enumerate(units):
                log.merge(_unit(Path(out), number, unit, short_side, pool))
                bar.update(len(unit))
        log.check(1 - 1e-9, final=True)
        for ending, n in listing.passed_over.items():
            log.counts[f"not_read{ending}"] += n
        write_json(Path(out) / LISTED, {"job": held.job, "faults": log.to_dict()})
    return log


def _unit(out: Path, number: int, unit: Sequence[Photograph], short_side: int, pool: ThreadPoolExecutor) -> Faults:
    """Write one tar, unless it is there; what was unusable is in a file beside it, which is written last."""
    beside = out / "parts" / f"{number:06d}.json"
    if beside.exists():
        return Faults.read(json.loads(beside.read_text()))
    log = FaultLog()
    shard = f"photographs-{number:04d}-000000.tar"
    with ShardWriter(out, f"photographs-{number:04d}", per_shard=len(unit)) as writer:
        samples = pool.map(lambda p: _sample(p, short_side), unit)
        for at, (photograph, made) in enumerate(zip(unit, samples, strict=True)):
            log.seen()
            if isinstance(made, str):
                log.add("broken_image", shard, photograph.name, made)
            else:
                # a key has no dot, and two names may differ in a dot or their ending alone
                stem = re.sub(r"[^\w-]+", "_", photograph.path.stem)
                writer.write(f"{number * PER_TAR + at:06d}-{stem}", made)
    faults = log.take()
    write_json(beside, list(faults))
    return faults


def _sample(photograph: Photograph, short_side: int) -> dict[str, Any] | str:
    """The fields of a sample, or why it cannot be read."""
    try:
        ending, data, size = _small(photograph.path, short_side)
    except BrokenImage as e:
        return str(e)
    about = {"file": photograph.name, "width": size[0], "height": size[1]}
    said, more = _said(photograph.path)
    if photograph.folder:
        more.setdefault("class", photograph.folder)
    fields: dict[str, Any] = {ending: data, "json": {**more, **about}}
    return fields | {"txt": said} if said else fields


def _small(path: Path, short_side: int) -> tuple[str, bytes, tuple[int, int]]:
    """``(ending, bytes, size of the original)`` of an image that is not larger than it needs to be."""
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            kind, size, orientation = image.format, image.size, image.getexif().get(0x0112, 1)
            if min(size) <= short_side and orientation == 1 and kind in ("JPEG", "PNG", "WEBP"):
                image.load()
                return {"JPEG": "jpg"}.get(kind, kind.lower()), data, size
            scale = min(1.0, short_side / min(size))
            target = tuple(max(1, round(s * scale)) for s in size)
            image.draft("RGB", tuple(2 * t for t in target))  # JPEG decoders scale for free; twice keeps what is fine
            rgb = to_rgb(ImageOps.exif_transpose(image))
    except Exception as e:  # decoders raise OSError, ValueError, SyntaxError, struct.error and others on damaged bytes
        raise BrokenImage(str(e) or type(e).__name__) from e
    if orientation >= 5:  # turned by a quarter
        target, size = target[::-1], size[::-1]
    out = io.BytesIO()
    rgb.resize(target, Image.Resampling.LANCZOS).save(out, "jpeg", quality=QUALITY)
    return "jpg", out.getvalue(), size


def _said(path: Path) -> tuple[str, dict[str, Any]]:
    """The caption that lies beside an image, and what else its json holds."""
    more: dict[str, Any] = {}
    for beside in (path.with_suffix(".json"), Path(f"{path}.json")):
        if beside.is_file():
            try:
                found = json.loads(beside.read_bytes())
            except ValueError:
                continue
            more = found if isinstance(found, dict) else {}
            break
    if (text := path.with_suffix(".txt")).is_file() and (said := read_text(text).strip()):
        return said, more
    return next(_captions(more), ""), more


def _captions(more: dict[str, Any]) -> Iterator[str]:
    for field in CAPTION_FIELDS:
        value = more.get(field)
        value = value[0] if isinstance(value, list) and value else value
        if isinstance(value, str) and value.strip():
            yield value.strip()
