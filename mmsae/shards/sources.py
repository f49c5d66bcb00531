"""Which shards a pattern names, and sources that are mixed by weight."""

from __future__ import annotations

import glob
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

from mmsae.shards.names import valid_name
from mmsae.types import InputError

SUFFIXES = (".tar", ".tar.gz", ".tgz")
OTHER_SUFFIXES = (".tar.zst", ".tzst", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.lz4")

log = logging.getLogger("mmsae.shards")


class Shard(str):
    """The path of a tar that knows what the tar is called in its set."""

    #: The file name. Where another tar of the set has the same one (img2dataset calls the first tar of every set
    #: ``00000.tar``), as many of the folders above it stand in front as tell the tars of that name apart:
    #: ``cats/00000.tar``. It is part of the uids made here and does not depend on the order of the tars or on the
    #: working folder.
    name: str

    def __new__(cls, path: str, name: str = "") -> Shard:
        """A path and its name; without one, the file name."""
        shard = super().__new__(cls, path)
        shard.name = valid_name(name or os.path.basename(path))
        return shard


def shard_name(path: str | os.PathLike[str]) -> str:
    """What a tar is called in its set (``Shard.name``); the file name of a path that belongs to none."""
    return path.name if isinstance(path, Shard) else valid_name(os.path.basename(path))


def identity(paths: Sequence[str]) -> list[list[Any]]:
    """Names and sizes of shards, by which a job knows them again."""
    return [[shard_name(p), os.path.getsize(p)] for p in paths]


class Source(NamedTuple):
    """One of several sets of shards that training mixes."""

    pattern: str | list[str]  #: Path, folder, glob or brace pattern, or a list of those.
    weight: float = 1.0  #: Probability, relative to the other sources, that a training sample comes from this one.
    name: str = ""  #: Goes into the uids made for samples without one.


Sources = str | list[str] | list[Source] | dict[str, float]
"""A pattern, patterns, sources, or ``{pattern: weight}``."""


def expand(pattern: str | Sequence[str]) -> list[Shard]:
    """The shards that a pattern names, as paths; ``Shard`` objects keep their names.

    Braces come first (``{000..019}``, ``{a,b}``), then globs (sorted by name), then folders (all their tars, not those
    of their subfolders). Every name that braces give must match. Braces and wildcard characters in the names of folders
    that exist are no wildcards. A shard named twice is read once. Tars end in ``.tar``, ``.tar.gz`` or ``.tgz``, in any
    case.

    Raises:
        InputError: If a pattern matches nothing, a shard that it names is missing or is not a tar, or one file is named
            by two paths.
    """
    patterns = [pattern] if isinstance(pattern, (str, os.PathLike)) else list(pattern)
    if not patterns:
        raise InputError("No shards were given: the list of patterns is empty.")
    return name_shards(path for p in patterns for path in _expand_one(os.path.expanduser(os.fspath(p))))


def name_shards(paths: Iterable[str]) -> list[Shard]:
    """The tars of one set, each once, under names that differ.

    Raises:
        InputError: If one file is named by two paths.
    """
    groups: dict[str, list[str]] = {}
    unique = list(dict.fromkeys(paths))
    for path in unique:
        groups.setdefault(os.path.basename(path), []).append(path)
    named = {}
    for name, group in groups.items():
        for path, own in zip(group, _told_apart(group) if len(group) > 1 else [name], strict=True):
            named[path] = path if isinstance(path, Shard) else Shard(path, own)
    return [named[path] for path in unique]


def _told_apart(paths: list[str]) -> list[str]:
    """The shortest ends of some paths of equal file names that differ, as long for all."""
    files: dict[tuple[int, int], str] = {}
    for path in paths:
        stat = os.stat(path)
        if first := files.get((stat.st_dev, stat.st_ino)):
            raise InputError(f"{first} and {path} are the same file: name it once.")
        files[stat.st_dev, stat.st_ino] = path
    parts = [os.path.abspath(path).split(os.sep) for path in paths]
    n = next(n for n in range(2, max(map(len, parts)) + 1) if len({tuple(p[-n:]) for p in parts}) == len(parts))
    return ["/".join(p[-n:]) for p in parts]


def _expand_one(pattern: str) -> list[str]:
    names = _braces(pattern)
    found = [_one_name(name) for name in names]
    missing = [n for n, paths in zip(names, found, strict=True) if not paths]
    if 0 < len(missing) < len(names):
        raise InputError(f"{len(missing)} of the {len(names)} shards of {pattern} do not exist; first: {missing[0]}.")
    if missing:
        head, rest = _literal(pattern)
        folder, more, _ = rest.partition("/")
        if more and not glob.has_magic(folder) and "{" not in folder:
            raise InputError(f"No shard matches {pattern}: the folder {head}{folder} does not exist.")
        tars, others = _listed(os.path.join(glob.escape(head), "*"))
        packed = f" and {len(others)} packed in another way, such as {others[0]}" if others else ""
        raise InputError(f"No shard matches {pattern}: the folder {head or '.'} holds {len(tars)} other tars{packed}.")
    return [path for paths in found for path in paths]


def _one_name(name: str) -> list[str]:
    """The shards of a name without braces: a file, a folder's tars, or what a glob matches."""
    if os.path.isfile(name):
        if not name.lower().endswith(SUFFIXES):
            raise InputError(f"{name} is not a shard: its name ends in none of {', '.join(SUFFIXES)}.")
        return [name]
    head, rest = _literal(name)
    magic = os.path.join(glob.escape(name), "*") if os.path.isdir(name) else glob.escape(head) + rest
    tars, others = _listed(magic)
    if tars and others:
        _say_passed_over(len(others), others[0])
    return tars


def _listed(pattern: str) -> tuple[list[str], list[str]]:
    """The tars that a glob matches, and the archives that are packed so that they cannot be read."""
    files = sorted(p for p in glob.glob(pattern, recursive=True) if os.path.isfile(p))
    tars, others = ([p for p in files if p.lower().endswith(ends)] for ends in (SUFFIXES, OTHER_SUFFIXES))
    return tars, others


@cache
def _say_passed_over(n: int, first: str) -> None:
    log.warning("%d archives are passed over, such as %s: shards end in %s.", n, first, ", ".join(SUFFIXES))


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
        together = name_shards(str(p) for s, paths in given if s.name == name for p in paths)
        named |= {(name, p): p for p in together}
    return [(s, [named[s.name, p] for p in paths]) for s, paths in given]
