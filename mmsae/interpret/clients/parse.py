"""What a model's answer says, or None where it says nothing that was asked for: never a guess."""

from __future__ import annotations

import json
import re
from typing import Any

_NOTHING = re.compile(r"\b(unable|cannot|can't|unknown|unclear|unsure|no (common|shared|clear)|none|n/a)\b", re.I)
_FENCE = re.compile(r"```(?:json)?\s*|\s*```")
LONGEST = 100  # characters of a name


def json_in(text: str | None, opening: str = "{") -> Any:
    """The first JSON object (or list, ``opening="["``) in a text; None where there is none."""
    if not text:
        return None
    text, decoder = _FENCE.sub(" ", text), json.JSONDecoder()
    for at in (m.start() for m in re.finditer(re.escape(opening), text)):
        try:
            return decoder.raw_decode(text[at:])[0]
        except ValueError:
            continue
    return None


def flags(text: str | None, n: int) -> list[bool] | None:
    """``n`` yes-or-no answers as a JSON list of 0 and 1; None for anything else, a list of another length too."""
    found = json_in(text, "[")
    if not isinstance(found, list) or len(found) != n or any(v not in (0, 1) or isinstance(v, str) for v in found):
        return None
    return [bool(v) for v in found]


def levels(text: str | None, n: int, most: float) -> list[float] | None:
    """``n`` numbers from 0 to ``most`` as a JSON list; None for anything else, a list of another length too."""
    found = json_in(text, "[")
    if not isinstance(found, list) or len(found) != n:
        return None
    if any(isinstance(v, bool) or not isinstance(v, int | float) or not 0 <= v <= most for v in found):
        return None
    return [float(v) for v in found]


def phrases(text: str | None, most: int) -> list[str] | None:
    """Up to ``most`` short texts of a JSON list, without those that say that there is nothing; None for any other."""
    found = json_in(text, "[")
    if not isinstance(found, list) or any(not isinstance(v, str) or len(v) > LONGEST for v in found):
        return None
    return [name for v in found[:most] if (name := _tidy(v)) and not _NOTHING.search(name)]


def one_number(text: str | None, low: int, high: int) -> int | None:
    """The only whole number of a text, if it lies in ``[low, high]``; None otherwise."""
    found = re.findall(r"-?\d+(?:\.\d+)?", text or "")
    if len(set(found)) != 1 or not found[0].isdigit():
        return None
    return int(found[0]) if low <= int(found[0]) <= high else None


def concept(text: str | None) -> str | None:
    """The ``concept`` of an answer in JSON as a name, empty where the model says that there is none; None where it
    said something else.
    """
    found = json_in(text)
    if not isinstance(found, dict) or "concept" not in found:
        return None
    name = found["concept"]
    if name is None:
        return ""
    if not isinstance(name, str) or len(name) > LONGEST:
        return None
    name = _tidy(name)
    return "" if _NOTHING.search(name) else name


def _tidy(text: str) -> str:
    return " ".join(text.split()).strip(" .\"'")
