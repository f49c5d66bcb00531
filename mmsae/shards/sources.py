"""Which shards a pattern names, and sources that are mixed by weight."""

from __future__ import annotations

import glob
import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from mmsae.types import InputError

SUFFIXES = (".tar", ".tar.gz", ".tgz")


class Source(NamedTuple):
    """One of several sets of shards that training mixes.

    Attributes:
        pattern: Path, folder, glob or brace pattern, or a list of those.
        weight: Probability, relative to the other sources, that a training sample comes from this one.
        name: Goes into the uids made for samples without one; give different names to sources whose shards have
            equal file names.
    """

    pattern: str | list[str]
    weight: float = 1.0
    name: str = ""


Sources = str | list[str] | list[Source] | dict[str, float]
"""A pattern, patterns, sources, or ``{pattern: weight}``."""


def expand(pattern: str | Sequence[str]) -> list[str]:
    """The shards that a pattern names.

    Braces come first (``{000..019}``, ``{a,b}``), then globs (sorted by name), then folders (all their tars, not those
    of their subfolders). A name without wildcards must exist. A shard named twice is read once.

    Args:
        pattern: Path, folder, glob or brace pattern; or several.

    Returns:
        Paths of ``.tar``, ``.tar.gz`` or ``.tgz`` files.

    Raises:
        InputError: If a pattern matches nothing, or a shard that it names is missing or is not a tar.
    """
    patterns = [pattern] if isinstance(pattern, (str, os.PathLike)) else list(pattern)
    if not patterns:
        raise InputError("No shards were given: the list of patterns is empty.")
    return list(dict.fromkeys(path for p in patterns for path in _expand_one(os.path.expanduser(os.fspath(p)))))


def _expand_one(pattern: str) -> list[str]:
    names = _braces(pattern)
    missing = [n for n in names if not glob.has_magic(n) and not os.path.exists(n)]
    if missing and len(missing) < len(names):
        raise InputError(f"{len(missing)} of the {len(names)} shards of {pattern} do not exist; first: {missing[0]}.")
    found: list[str] = []
    for name in names:
        if os.path.isdir(name):
            found += _tars(os.path.join(glob.escape(name), "*"))
        elif os.path.exists(name):
            if not name.endswith(SUFFIXES):
                raise InputError(f"{name} is not a shard: its name ends in none of {', '.join(SUFFIXES)}.")
            found.append(name)
        else:
            found += _tars(name)
    if not found:
        folder = os.path.dirname(pattern.split("{")[0].split("*")[0]) or "."
        tars = len(_tars(os.path.join(glob.escape(folder), "*")))
        raise InputError(
            f"No shard matches {pattern}: the folder {folder} "
            + (f"holds {tars} other tars." if os.path.isdir(folder) else "does not exist.")
        )
    return found


def _tars(pattern: str) -> list[str]:
    return sorted(p for p in glob.glob(pattern, recursive=True) if p.endswith(SUFFIXES) and os.path.isfile(p))


def _braces(pattern: str) -> list[str]:
    if "{" not in pattern or os.path.exists(pattern):
        return [pattern]
    import braceexpand

    try:
        return list(braceexpand.braceexpand(pattern))
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
