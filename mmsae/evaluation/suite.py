"""A suite: which data, which heads with which options. Read from YAML and checked before anything is loaded."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from mmsae.files import read_text
from mmsae.remote.urls import is_url
from mmsae.shards import expand
from mmsae.types import InputError

SETS = ("train", "val", "test")
HEADS: dict[str, Callable] = {}  # filled by @head


class NotApplicable(Exception):
    """This head cannot run here; the message is the reason that the card gives."""


def head(fn: Callable) -> Callable:
    """Register a head: ``fn(data, **options) -> HeadResult``; its keyword arguments are its options."""
    HEADS[fn.__name__] = fn
    return fn


@dataclass(frozen=True)
class DataSet:
    """Images of a suite."""

    shards: str | list[str]  #: Path, folder, glob or brace pattern, or several, relative to the suite's root
    label: str | None = None  #: ``cls`` or a json field; None: the suite's
    limit: int | None = None  #: At most so many images, by a hash of their uid
    #: Only images whose hash lies in ``[low, high)``, so that one set of shards gives disjoint sets.
    part: tuple[float, float] | None = None
    change: dict[str, float] = field(default_factory=dict)  #: ``{shift: strength}`` (:mod:`mmsae.evaluation.shifts`)
    exclude: tuple[str | int, ...] = ()  #: Classes that are left out
    #: ``{label value: class of the training set}``, or the json field that names it. Several labels may be one class.
    #: What the training set says makes its classes, and holds for the sets that say nothing (but for OOD sets).
    relabel: dict[str, Any] | str | None = None
    #: ``shift`` (same classes: a target of generalisation), ``ood``, ``near_ood`` or ``val_ood``; empty for ``train``,
    #: ``val`` and ``test``.
    role: str = ""
    unlabelled: bool = False  #: Only images that have no label


RESERVED = ("id", "near", "far")  # what OOD tables call the ID set and the means
ROLES = ("", "shift", "ood", "near_ood", "val_ood")


@dataclass(frozen=True)
class Suite:
    """What :func:`mmsae.evaluation.card.command.evaluate` runs."""

    data: dict[str, DataSet]  #: ``train``, ``val``, ``test`` and any others by name
    heads: dict[str, dict[str, Any]]  #: ``{head: options}``, in the order of the card
    root: str = ""  #: Folder that data paths are relative to; empty: the working folder
    host: str = ""  #: Name; empty: the host of the SAE's site
    label: str = "cls"  #: Label of all sets that do not say otherwise
    classes: str = ""  #: File of class names, for prompts; empty: the names in the data
    templates: str = "simple"  #: File of prompt templates, or ``simple`` or ``openai``
    #: What judges likeness: ``json:FIELD`` (truths in the data), or the embeddings of a host by name, or of ``host``
    #: (the SAE's own: circular, and said so).
    judge: str = "host"
    concepts: str = ""  #: ``json:FIELD`` of a list of true concepts, for probes; empty: the classes
    trees: dict[str, str] = field(default_factory=dict)  #: ``{name: file}`` or ``{name: wordnet}``
    #: ``{name: SAE folder}`` of other seeds, relative to the root, for stability.
    others: dict[str, str] = field(default_factory=dict)
    title: str = ""  #: Title of the page
    path: str = ""  #: The file

    def paths(self, name: str) -> list[str]:
        """The tars of a set."""
        shards = self.data[name].shards
        return expand(
            [s if is_url(s) else str(Path(self.root) / s) for s in ([shards] if isinstance(shards, str) else shards)]
        )

    def find(self, name: str) -> str:
        """A file that the suite names: in the working folder, under the root, beside the suite."""
        for place in (Path(name), Path(self.root) / name, Path(self.path).parent / name):
            if place.exists():
                return str(place)
        raise InputError(
            f"{self.path}: {name} is neither in the working folder nor in {self.root or '.'} nor beside it"
        )


def _checked(cls: type, given: Any, where: str) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise InputError(f"{where} is {type(given).__name__}, expected fields and values")
    known = {f.name for f in fields(cls)} - {"path"}
    if odd := sorted(set(map(str, given)) - known):
        raise InputError(f"{where} has the field {odd[0]!r}, it can have {', '.join(sorted(known))}")
    hints = get_type_hints(cls) | {"data": Any, "heads": Any}  # these two are read piece by piece
    for name, value in given.items():
        if value is not None and not _fits(value, hints[name]):
            kind = re.sub(r"typing\.| \| None", "", str(next(f.type for f in fields(cls) if f.name == name)))
            raise InputError(f"{where}: {name} is {value!r}, expected {kind}")
    return {k: v for k, v in given.items() if v is not None}


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value of YAML is of a type: lists count as tuples, whole numbers as floats."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, UnionType):
        return any(_fits(value, a) for a in args)
    if origin in (list, tuple, Sequence):
        return isinstance(value, list | tuple) and all(_fits(v, args[0]) for v in value)
    if origin is dict:
        return isinstance(value, Mapping) and all(_fits(v, args[1]) for v in value.values())
    kinds = (int, float) if hint is float else (hint,)
    return isinstance(value, kinds) and (hint is bool or not isinstance(value, bool))


def parse_suite(content: Any, path: str = "suite", root: str = "", host: str = "") -> Suite:
    """A suite from what its YAML holds; ``root`` and ``host``, where given, win over it.

    Raises:
        InputError: A field, head, option or role that does not exist, or no ``train`` or ``test``.
    """
    given = _checked(Suite, content, path)
    data, said = {}, given.get("data") or {}
    if not isinstance(said, Mapping):
        raise InputError(f"{path}: data is {said!r}, expected names of sets and what they are")
    for name, one in said.items():
        own = _checked(DataSet, {"shards": one} if isinstance(one, str | list) else one, f"{path}: data.{name}")
        if "shards" not in own:
            raise InputError(f"{path}: data.{name} has no shards")
        part = own.get("part")
        if part is not None and not (len(part) == 2 and 0 <= part[0] < part[1] <= 1):
            raise InputError(f"{path}: data.{name}.part is {part}, expected two numbers from 0 to 1, rising")
        if own.get("role", "") not in ROLES:
            raise InputError(f"{path}: data.{name}.role is {own['role']!r}, it can be {', '.join(filter(None, ROLES))}")
        if name not in SETS and not own.get("role"):
            raise InputError(f"{path}: data.{name} needs a role: {', '.join(filter(None, ROLES))}")
        if own.get("limit", 1) < 1:
            raise InputError(f"{path}: data.{name}.limit is {own['limit']}, expected at least 1")
        if name in RESERVED:
            raise InputError(f"{path}: data.{name}: choose another name, {', '.join(RESERVED)} stand in the tables")
        data[name] = DataSet(**{**own, "exclude": tuple(own.get("exclude", ())), "part": part and tuple(part)})
    if lacking := [s for s in ("train", "test") if s not in data]:
        raise InputError(f"{path}: data has no {lacking[0]}")
    heads = given.get("heads") or list(HEADS)
    if not isinstance(heads, Mapping) and not _fits(heads, list[str]):
        raise InputError(f"{path}: heads is {heads!r}, expected names of heads, or names and options")
    heads = dict.fromkeys(heads) if isinstance(heads, list) else dict(heads)
    for name, options in heads.items():
        if name not in HEADS:
            raise InputError(f"{path}: no head {name!r}, there are {', '.join(HEADS)}")
        if not isinstance(options or {}, Mapping):
            raise InputError(f"{path}: heads.{name} is {options!r}, expected options and values")
        known = list(inspect.signature(HEADS[name]).parameters)[1:]
        if odd := sorted(set(options or {}) - set(known)):
            raise InputError(
                f"{path}: heads.{name} has the option {odd[0]!r}, it can have {', '.join(known) or 'none'}"
            )
        hints = get_type_hints(HEADS[name])
        if bad := [k for k, v in (options or {}).items() if not _fits(v, hints[k])]:
            kind = inspect.signature(HEADS[name]).parameters[bad[0]].annotation
            raise InputError(f"{path}: heads.{name}.{bad[0]} is {options[bad[0]]!r}, expected {kind}")
    rest = {k: v for k, v in given.items() if k not in ("data", "heads")}
    rest |= {k: v for k, v in {"root": root, "host": host}.items() if v}
    return Suite(data, {k: dict(v or {}) for k, v in heads.items()}, path=path, **rest)


def load_suite(path: str, root: str = "", host: str = "") -> Suite:
    """Read a suite from a YAML file.

    Raises:
        InputError: Not readable, not YAML, or see :func:`parse_suite`.
    """
    import yaml

    try:
        content = yaml.safe_load(read_text(path))
    except yaml.YAMLError as e:
        raise InputError(f"{path} cannot be read as YAML: {' '.join(str(e).split())}") from e
    return parse_suite(content, str(path), root, host)
