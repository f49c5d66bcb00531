"""Which shards a pattern names, and sources that are mixed by weight."""

from __future__ import annotations

import glob
import logging
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cache
from typing import NamedTuple

from mmsae.remote.urls import file_name, is_url, path_of
from mmsae.shards import table
from mmsae.shards.elsewhere import remote_footer, remote_shards
from mmsae.shards.folder import FILES, folder_units, list_images
from mmsae.shards.shard import SUFFIXES, TABLES, TARS, Shard
from mmsae.types import InputError

PACKED = (".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.lz4")
"""Ends of the names of tars that are packed so that they are not read."""

_OPTIONS = re.compile(r"#((?:image|files)=[^#&]+(?:&(?:image|files)=[^#&]+)*)$")

log = logging.getLogger("mmsae.shards")


class Source(NamedTuple):
    """One of several sets of shards that training mixes."""

    pattern: str | list[str]  #: Path, folder, glob or brace pattern, or a list of those.
    weight: float = 1.0  #: Probability, relative to the other sources, that a training sample comes from this one.
    name: str = ""  #: Goes into the uids made for samples without one.


Sources = str | list[str] | list[Source] | dict[str, float]
"""A pattern, patterns, sources, or ``{pattern: weight}``."""


def expand(pattern: str | Sequence[str]) -> list[Shard]:
    """The units that a pattern names; ``Shard`` objects are taken as they are.

    Braces come first (``{000..019}``, ``{a,b}``), then globs (sorted by name), then folders: all tars of a folder, else
    all its parquet files (not those of its subfolders), else its images and those of the folders below, 1,000 of them
    a unit. Every name that braces give must match. Braces and wildcard characters in the names of folders that exist
    are no wildcards. A shard named twice is read once. Tars end in ``.tar``, ``.tar.gz``, ``.tgz``, ``.tar.zst`` or
    ``.tzst``, tables in ``.parquet``, in any case. ``#image=COLUMN`` behind a pattern names the column of the images,
    ``#files=250`` says how many loose images make a unit.

    Raises:
        InputError: If a pattern matches nothing, a shard that it names is missing or is none, or one file is named by
            two paths.
    """
    patterns = [pattern] if isinstance(pattern, (str, os.PathLike)) else list(pattern)
    if not patterns:
        raise InputError("No shards were given: the list of patterns is empty.")
    given = {p for p in patterns if isinstance(p, Shard)}
    found = [s for p in patterns for s in ([p] if p in given else _expand_one(os.path.expanduser(os.fspath(p))))]
    return [u for s in name_shards(found, given) for u in ([s] if s in given else _units(s))]


def name_shards(shards: Iterable[Shard], keep: Collection[str] = ()) -> list[Shard]:
    """The units of one set, each once, under names that differ; those of ``keep`` have theirs.

    Raises:
        InputError: If one file is named by two paths.
    """
    unique: dict[str, Shard] = {}
    for shard in shards:
        unique.setdefault(str(shard), shard)
    groups: dict[str, list[str]] = {}
    for file in dict.fromkeys(s.file for s in unique.values()):
        groups.setdefault(file_name(file) if is_url(file) else os.path.basename(file), []).append(file)
    names = {}
    for name, group in groups.items():
        names |= dict(zip(group, _told_apart(group) if len(group) > 1 else [name], strict=True))
    return [s if s in keep else s.called(names[s.file]) for s in unique.values()]


def _told_apart(paths: list[str]) -> list[str]:
    """The shortest ends of some paths of equal file names that differ, as long for all."""
    files: dict[tuple[int, int], str] = {}
    for path in paths:
        if is_url(path):
            continue
        stat = os.stat(path)
        if first := files.get((stat.st_dev, stat.st_ino)):
            raise InputError(f"{first} and {path} are the same file: name it once.")
        files[stat.st_dev, stat.st_ino] = path
    parts = [path_of(path).split("/") if is_url(path) else os.path.abspath(path).split(os.sep) for path in paths]
    n = next((n for n in range(2, max(map(len, parts)) + 1) if len({tuple(p[-n:]) for p in parts}) == len(parts)), None)
    if n is None:
        same = next(i for i, p in enumerate(parts) if p in parts[:i])
        raise InputError(f"{paths[parts.index(parts[same])]} and {paths[same]} cannot be told apart: name one of them.")
    return ["/".join(p[-n:]) for p in parts]


def _units(shard: Shard) -> list[Shard]:
    """The units of a file or folder."""
    if shard.kind == "images":
        return folder_units(shard)
    if shard.kind == "table" and shard.size > table.UNIT_BYTES:
        return table.table_units(shard, table.read_footer(shard.file) if shard.remote is None else remote_footer(shard))
    return [shard]


def _expand_one(pattern: str) -> list[Shard]:
    options: dict[str, str] = {}
    pattern = pattern.removeprefix("file://")
    if (behind := _OPTIONS.search(pattern)) and not os.path.exists(pattern):
        pattern, options = pattern[: behind.start()], dict(o.split("=", 1) for o in behind[1].split("&"))
    if is_url(pattern):
        return remote_shards(pattern, options)
    names = _braces(pattern)
    found = [_one_name(name, options) for name in names]
    missing = [n for n, shards in zip(names, found, strict=True) if not shards]
    if 0 < len(missing) < len(names):
        raise InputError(f"{len(missing)} of the {len(names)} shards of {pattern} do not exist; first: {missing[0]}.")
    if missing:
        raise InputError(_nothing_matches(pattern))
    return [shard for shards in found for shard in shards]


def _nothing_matches(pattern: str) -> str:
    head, rest = _literal(pattern + "/" * os.path.isdir(pattern))
    folder, more, _ = rest.partition("/")
    if more and not glob.has_magic(folder) and "{" not in folder:
        return f"No shard matches {pattern}: the folder {head}{folder} does not exist."
    tars, tables, packed = _listed(os.path.join(glob.escape(head), "*"))
    holds = f"{len(tars)} other tars" + (f", {len(tables)} parquet files" if tables else "")
    if packed:
        holds += f" and {len(packed)} packed in another way, such as {packed[0]}"
    if os.path.isdir(pattern):
        others = list_images(pattern).passed_over
        holds += "".join(f", {n} {e} in it or below it, which are not read as images" for e, n in others.items())
    return f"No shard matches {pattern}: the folder {head or '.'} holds {holds}."


def _one_name(name: str, options: dict[str, str]) -> list[Shard]:
    """The shards of a name without braces: a file, what a folder holds, or what a glob matches."""
    if os.path.isfile(name):
        if not name.lower().endswith(SUFFIXES):
            raise InputError(f"{name} is not a shard: its name ends in none of {', '.join(SUFFIXES)}.")
        return [Shard(name, options=options)]
    head, rest = _literal(name)
    is_folder = os.path.isdir(name)
    magic = os.path.join(glob.escape(name), "*") if is_folder else glob.escape(head) + rest
    tars, tables, packed = _listed(magic)
    chosen = (tars or tables) if is_folder else sorted(tars + tables)
    if chosen and (passed_over := packed + (tables if is_folder and tars else [])):
        _say_passed_over(len(passed_over), passed_over[0])
    if is_folder and not chosen:
        return _folder(name, options)
    return [Shard(path, options=options) for path in chosen]


def _folder(path: str, options: dict[str, str]) -> list[Shard]:
    """A folder of loose images; nothing where it has none, or where tars or tables lie below it."""
    images, others = list_images(path)
    below = [e for e in others if e in SUFFIXES]
    if not images or below:
        return []
    files = options.get("files", str(FILES))
    if not files.isdigit() or not int(files):
        raise InputError(f"{path}#files={files}: it is a number of images, at least 1.")
    for ending, n in others.items():
        _say_passed_over(n, f"the {ending} below {path}")
    folder = path.rstrip(os.sep) or path
    return [Shard(f"{folder}#files={files}", file=folder, kind="images", images=tuple(images), options=options)]


def _listed(pattern: str) -> tuple[list[str], list[str], list[str]]:
    """The tars and the tables that a glob matches, and the archives that are packed so that they cannot be read."""
    files = sorted(p for p in glob.glob(pattern, recursive=True) if os.path.isfile(p))
    tars, tables, packed = ([p for p in files if p.lower().endswith(ends)] for ends in (TARS, TABLES, PACKED))
    return tars, tables, packed


@cache
def _say_passed_over(n: int, first: str) -> None:
    log.warning("%d files are passed over, such as %s: shards end in %s.", n, first, ", ".join(SUFFIXES))


def _literal(pattern: str) -> tuple[str, str]:
    """The folders at the beginning of a pattern that are there as they are spelled, brackets and all, and the rest."""
    at = 0
    for i, letter in enumerate(pattern):
        if letter == "/":
            if not os.path.isdir(pattern[: i + 1]):
                break
            at = i + 1
    return pattern[:at], pattern[at:]


def _braces(pattern: str) -> list[str]:
    if os.path.exists(pattern):
        return [pattern]
    head, rest = _literal(pattern)
    if "{" not in rest:
        return [pattern]
    import braceexpand

    try:
        return [head + name for name in braceexpand.braceexpand(rest)]
    except braceexpand.UnbalancedBracesError:
        raise InputError(f"The braces of the shard pattern {pattern} do not balance.") from None


def as_sources(sources: Sources | Source | Sequence[Source | str]) -> list[Source]:
    """Sources from whatever form the user gave; plain patterns together make one unnamed source.

    Raises:
        InputError: If there is none, or a weight is not positive.
    """
    if isinstance(sources, Mapping):
        found = [Source(pattern, weight) for pattern, weight in sources.items()]
    elif isinstance(sources, (str, os.PathLike, Source)):
        found = [sources if isinstance(sources, Source) else Source(os.fspath(sources))]
    elif any(isinstance(s, Source) for s in sources):
        found = [s if isinstance(s, Source) else Source(s) for s in sources]
    else:
        found = [Source(list(sources))]
    for source in found:
        if not source.weight > 0:
            raise InputError(f"The weight of the shards {source.pattern} is {source.weight}; it must be above 0.")
    return found


def expand_sources(sources: Sources | Source | Sequence[Source | str]) -> list[tuple[Source, list[Shard]]]:
    """Sources with their shards; the names of shards differ within all sources of one name together."""
    given = [(s, expand(s.pattern)) for s in as_sources(sources)]
    named = {}
    for name in {s.name for s, _ in given}:
        together = name_shards(p for s, paths in given if s.name == name for p in paths)
        named |= {(name, p): p for p in together}
    return [(s, [named[s.name, p] for p in paths]) for s, paths in given]
