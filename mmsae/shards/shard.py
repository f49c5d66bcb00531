"""One unit of a data set: a tar, some images of a folder, or a parquet file or some of its row groups."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from mmsae.remote.urls import Remote, file_name, is_url
from mmsae.shards.names import valid_name

TARS = (".tar", ".tar.gz", ".tgz", ".tar.zst", ".tzst")
"""Ends of the names of tars, in any case."""
TABLES = (".parquet",)
"""Ends of the names of tables."""
SUFFIXES = TARS + TABLES
"""Ends of the names of files that hold samples."""

Kind = Literal["tar", "images", "table"]


class ImageFile(NamedTuple):
    """A loose image and what lies beside it."""

    name: str  #: Its path in the folder, with slashes.
    key: str  #: Its key: the name without its ending and without dots.
    size: int  #: Bytes of the image, and of what lies beside it.
    txt: str  #: Path in the folder of the ``.txt`` with its caption; empty: there is none.
    json: str  #: Likewise of the ``.json``.


class Found(NamedTuple):
    """What was found out about a unit when the data set was listed; a tar on this machine is not looked at before."""

    size: int  #: Bytes.
    tag: str  #: Tells another content of the same size: an ETag, or a hash of what it is made of.


class Shard(str):
    """A unit of a data set: its path or URL, and what is known of it. Two units of one data set differ as text."""

    #: What the unit is called in its set. For a whole file it is the file name. Where another file of the set has the
    #: same one (img2dataset calls the first tar of every set ``00000.tar``), as many of the folders above it stand in
    #: front as tell the files of that name apart: ``cats/00000.tar``. It does not depend on the order of the files or
    #: on the working folder. A part of a file or folder has its place behind a ``#``.
    name: str
    base: str  #: The name without the place: part of the uids made here, so that they do not depend on units.
    file: str  #: The file or folder that the unit is, or is a part of.
    kind: Kind  #: How samples lie in it.
    found: Found | None  #: Size and tag; None: a file on this machine whose size is asked when it is needed.
    remote: Remote | None  #: Its file, where that lies elsewhere and is brought to the cache.
    images: tuple[ImageFile, ...]  #: The images of a unit of a folder.
    groups: tuple[int, int] | None  #: First row group and the one after the last; None: all of the table.
    options: dict[str, str]  #: What the user said behind a ``#``, as ``{"image": "picture"}``.

    def __new__(cls, path: str, name: str = "", **about: Any) -> Shard:
        """A unit by its text and its name; without one, the file name. ``about`` sets what else is known."""
        shard = super().__new__(cls, path)
        file = file_name(path) if is_url(path) else os.path.basename(path)
        shard.file, shard.kind = path, "table" if file.lower().endswith(TABLES) else "tar"
        shard.found = shard.remote = shard.groups = None
        shard.images, shard.options = (), {}
        shard.name = shard.base = valid_name(name or file)
        vars(shard).update(about)
        return shard

    @property
    def size(self) -> int:
        """Bytes."""
        return os.path.getsize(self.file) if self.found is None else self.found.size

    @property
    def tag(self) -> str:
        """Tells another content of the same size; empty for a file on this machine."""
        return "" if self.found is None else self.found.tag

    def called(self, base: str) -> Shard:
        """The same unit of a file or folder with another name in its set."""
        base = valid_name(base)
        return Shard(str(self), **vars(self) | {"base": base, "name": base + self.name[len(self.base) :]})


def as_shard(path: str | os.PathLike[str]) -> Shard:
    """A unit; a path that is none yet is taken as a whole file."""
    return path if isinstance(path, Shard) else Shard(os.fspath(path))


def shard_name(path: str | os.PathLike[str]) -> str:
    """What a unit is called in its set (``Shard.name``); the file name of a path that belongs to none."""
    return as_shard(path).name


def shard_size(path: str | os.PathLike[str]) -> int:
    """Bytes of a unit."""
    return as_shard(path).size


def identity(paths: Sequence[str]) -> list[list[Any]]:
    """Names and sizes of units, and what else tells their content, by which a job knows them again."""
    return [[s.name, s.size, *([s.tag] if s.tag else [])] for s in map(as_shard, paths)]
