"""Labels and class names of shards, class files and prompt templates."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmsae.files import lines_of, read_text
from mmsae.shards import FaultLog, read_shards
from mmsae.types import InputError

TEMPLATE_SETS = {"simple": "SIMPLE_IMAGENET_TEMPLATES", "openai": "OPENAI_IMAGENET_TEMPLATES"}


class Labels(NamedTuple):
    """Label of every sample of some shards."""

    value: dict[str, Any]  #: ``{uid: label value}``, None where a sample has none
    #: ``{uid: class name}`` as the data says it (json's ``class``, or a label that is text); empty: none.
    name: dict[str, str]

    def without(self, exclude: Sequence[str]) -> Labels:
        """Without the samples whose label value or class name is among ``exclude`` (case and underscores ignored)."""
        out = {plain(e) for e in exclude}
        gone = {u for u, v in self.value.items() if plain(v) in out or plain(self.name[u]) in out}
        return Labels(*({u: v for u, v in d.items() if u not in gone} for d in self)) if gone else self

    def labelled(self) -> set[str]:
        """The samples that have a label."""
        return {u for u, v in self.value.items() if v is not None}

    def values_of(self, uids: Sequence[str]) -> list[Any]:
        """Label values that occur, sorted."""
        found = {v for u in uids if (v := self.value.get(u)) is not None}
        return sorted(found, key=lambda v: (isinstance(v, str), v))

    def numbers(self, uids: Sequence[str], values: Sequence[Any]) -> Tensor:
        """``(n,)`` place of each sample's label in ``values``, -1 for others."""
        at = {v: i for i, v in enumerate(values)}
        return torch.tensor([at.get(self.value.get(u), -1) for u in uids], dtype=torch.long)

    def name_of(self, value: Any) -> str:
        """The class name that all samples of a label share, else the label itself."""
        names = {n for u, n in self.name.items() if n and self.value[u] == value}
        return names.pop() if len(names) == 1 else str(value)

    def said(self, uids: Sequence[str]) -> dict[str, int]:
        """``{class name: samples}`` of the names that the data says."""
        return dict(Counter(n for u in uids if (n := self.name.get(u))))


def plain(name: Any) -> str:
    """A name for comparing: lower case, spaces for underscores and hyphens."""
    return " ".join(str(name).lower().replace("_", " ").replace("-", " ").split())


def read_labels(paths: Sequence[str], field: str = "cls", must: bool = True) -> Labels:
    """Labels of all samples of some shards; images are not decoded.

    The field is ``cls`` (the class number), or one of json; empty: no labels. ``must`` says whether there must be some.

    Raises:
        InputError: No sample has that field, and there must be labels; or a uid occurs twice.
    """
    value, name, log = {}, {}, FaultLog()
    for s in read_shards(paths, log, need=(), decode=False):
        v = s.cls if field == "cls" and s.cls is not None else s.meta.get(field) if field else None
        value[s.uid] = v if isinstance(v, (str, int, float)) else None
        said = s.meta.get("class")
        name[s.uid] = v if isinstance(v, str) else said if isinstance(said, str) else ""
    if must and field and value and all(v is None for v in value.values()):
        raise InputError(f"no sample of {paths[0]} has {'cls' if field == 'cls' else f'json field {field!r}'}")
    return Labels(value, name)


class Classes(NamedTuple):
    """What is to be told apart."""

    names: list[str]  #: Class names, as they stand in prompts
    values: list[Any]  #: The label value of each


def read_classes(file: str, known: Labels | None = None) -> Classes:
    """Classes from a file.

    ``.json``: a list of names, or ``{label value: name}``. Otherwise text, one name a line. Names without values stand
    for the class numbers 0, 1, ... where the data's labels (``known``) are numbers, and for themselves where they are
    text.

    Raises:
        InputError: No such file, not what is described, a name twice, or fewer than two classes.
    """
    content = _content(file)
    if isinstance(content, dict):
        names, values = [str(n) for n in content.values()], [_number(v) for v in content]
    else:
        names = [str(n) for n in content]
        texts = known is not None and any(isinstance(v, str) for v in known.value.values())
        values = list(names) if texts else list(range(len(names)))
    if twice := [n for n, c in Counter(names).items() if c > 1]:
        raise InputError(f"{file} has the class {twice[0]!r} {Counter(names)[twice[0]]} times, each must stand once")
    if len(names) < 2:
        raise InputError(f"{file} has {len(names)} class, at least 2 are needed to tell anything apart")
    return Classes(names, values)


def named_classes(file: str, known: Labels, paths: Sequence[str]) -> Classes:
    """Classes of a file; without one those that the data names.

    Raises:
        InputError: See :func:`read_classes`; or the data has fewer than two.
    """
    if file:
        return read_classes(file, known)
    values = known.values_of(list(known.value))
    if len(values) < 2:
        raise InputError(f"{paths[0]} and {len(paths) - 1} other shards have {len(values)} class: 2 are needed")
    return Classes([known.name_of(v) for v in values], values)


def read_templates(source: str = "simple") -> list[str]:
    """Prompt templates with ``{}`` for the class name.

    ``simple`` are open_clip's 7, ``openai`` its 80 for ImageNet; a file is a list in ``.json``, else text, one a line.

    Raises:
        InputError: No such file, or a template without ``{}``.
    """
    if source in TEMPLATE_SETS:
        import open_clip

        return [t("{}") for t in getattr(open_clip, TEMPLATE_SETS[source])]
    templates = _content(source)
    if isinstance(templates, dict) or not templates:
        raise InputError(f"{source} must hold a list of at least one template")
    if bad := [t for t in templates if "{}" not in str(t)]:
        raise InputError(f"{source}: template {bad[0]!r} has no {{}} for the class name")
    return [str(t) for t in templates]


def read_lines(file: str) -> list[str]:
    """Entries of a text or json list."""
    return [str(v) for v in _content(file)]


def _content(file: str) -> Any:
    text = read_text(file)
    if Path(file).suffix != ".json":
        return [line.strip() for line in lines_of(text) if line.strip() and not line.startswith("#")]
    try:
        content = json.loads(text)
    except ValueError as e:
        raise InputError(f"{file} is not valid JSON: {e}") from e
    if not isinstance(content, (list, dict)):
        raise InputError(f"{file} holds a {type(content).__name__}, expected a list or an object")
    return content


def _number(text: str) -> Any:
    return int(text) if text.lstrip("-").isdigit() else text
