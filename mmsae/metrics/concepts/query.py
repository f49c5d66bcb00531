"""Queries over concepts: ``red & ~circle``, ``(#12 > .5) | image:#40``, ``count("dog") >= 2``.

A query is written as text, is a tree (:class:`Query`) that turns into text again, and gives every item a score in
[0, 1]::

    query   = [ either ]                          nothing: every item, with score 1
    either  = both { "|" both }                   the maximum
    both    = not { "&" not }                     the minimum
    not     = "~" not | value [ compare number ]  1 - x;  1 where the comparison holds, else 0
    value   = "(" either ")" | latent | call
    latent  = [ modality ":" ] ( "#12" | "a name" | name )
    call    = "count" "(" latent ")"              number of areas of it; needs a comparison
            | "left_of" "(" latent "," latent ")" | "overlap" "(" latent "," latent ")"
    compare = ">" | ">=" | "<" | "<=" | "=="

The score of a latent is its value's percentile among the items on which it fires, and 0 where it is silent; without a
modality it is the larger one of all modalities. A name stands for every latent that has it, whatever the case of
letters (``*`` and ``?`` in quotation marks stand for any letters), and then the largest score counts. ``count``,
``left_of`` and ``overlap`` are of areas (:class:`AreaMeasures`).

Percentiles and minima are the calibration that queries of the scenarios of TRACE are given in this package
(reconstructed; its authors fill a schema by a language model). Silence of a latent is no proof of absence, so ``~`` is
weaker than it looks: it is as good as the latent's recall.
"""

from __future__ import annotations

import difflib
import json
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from mmsae.files import read_text, write_json
from mmsae.types import InputError

FORMAT, FILE = 1, "query.json"
COMPARE: dict[str, Callable] = {
    ">=": operator.ge, "<=": operator.le, "==": operator.eq, ">": operator.gt, "<": operator.lt
}  # fmt: skip
CALLS = {"count": 1, "left_of": 2, "overlap": 2}  # and their numbers of arguments
GRID = 2.0**23
DEEPEST = 100  # levels of a query: it is read and evaluated recursively
_TOKEN = re.compile(
    r"""\s*(?:(?P<latent>\#\d+) | "(?P<quoted>(?:[^"\\]|\\.)*)" | (?P<modality>[^\W\d]\w*): | (?P<word>[^\W\d][\w'-]*)
    | (?P<mark>>=|<=|==|[<>&|~(),]) | (?P<number>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?))""",
    re.X,
)


@dataclass(frozen=True)
class Query:
    """A query, or a part of one, as a tree; ``str`` of it is text that :func:`parse` turns into an equal tree."""

    op: str
    """``all``, ``latent``, ``name``, ``~``, ``&``, ``|``, a comparison, or the name of a call."""
    parts: tuple[Query, ...] = ()
    """What it is made of."""
    latent: int = -1
    """Of ``latent``: which."""
    name: str = ""
    """Of ``name``: which."""
    modality: str = ""
    """Of ``latent`` and ``name``: whose codes; empty: any."""
    value: float = 0.0
    """Of a comparison: with what."""

    def __str__(self) -> str:
        where = f"{self.modality}:" if self.modality else ""
        if self.op == "all":
            return ""
        if self.op == "latent":
            return f"{where}#{self.latent}"
        if self.op == "name":
            escaped = self.name.replace("\\", "\\\\").replace('"', '\\"')
            return f'{where}"{escaped}"'
        if self.op == "~":
            return f"~{self.parts[0]._inside()}"
        if self.op in COMPARE:
            value = int(self.value) if self.value == int(self.value) else self.value
            compared = f"({self.parts[0]})" if self.parts[0].op == "~" else self.parts[0]._inside()
            return f"{compared} {self.op} {value!r}"
        if self.op in CALLS:
            return f"{self.op}({', '.join(map(str, self.parts))})"
        return f" {self.op} ".join(p._inside() for p in self.parts)

    def _inside(self) -> str:
        """As a part of another."""
        return f"({self})" if self.op in ("&", "|", *COMPARE) else str(self)

    def leaves(self) -> Iterator[Query]:
        """Its latents and names, from left to right, again where they occur again."""
        if self.op in ("latent", "name"):
            yield self
        for part in self.parts:
            yield from part.leaves()

    def latents(self) -> list[int]:
        """Its latents, each once."""
        return sorted({q.latent for q in self.leaves() if q.op == "latent"})

    def calls(self) -> set[str]:
        """Which of ``count``, ``left_of`` and ``overlap`` it asks for."""
        return {self.op} & set(CALLS) | {c for part in self.parts for c in part.calls()}

    def bind(self, names: Mapping[int, str]) -> Query:
        """The same with latents in place of names; a name of several latents is any of them.

        Raises:
            InputError: No latent has a name.
        """
        if self.op != "name":
            return replace(self, parts=tuple(p.bind(names) for p in self.parts)) if self.parts else self
        found = [Query("latent", latent=j, modality=self.modality) for j in named(self.name, names)]
        return found[0] if len(found) == 1 else Query("|", tuple(found))


def named(name: str, names: Mapping[int, str]) -> list[int]:
    """Latents with a name, whatever the case of its letters; ``*`` and ``?`` stand for any letters.

    Raises:
        InputError: There is none; the sentence has names like it.
    """
    asked = name.casefold()
    found = sorted(j for j, own in names.items() if own and fnmatchcase(own.casefold(), asked.replace("[", "[[]")))
    if not found:
        like = difflib.get_close_matches(asked, {n.casefold() for n in names.values() if n}, 3)
        more = f"; there are {', '.join(like)}" if like else f" among {len(names)} names" if names else ", or any other"
        raise InputError(f"no latent is named {name!r}{more}; #12 stands for latent 12")
    return found


class _Reader:
    """Reads a query from its tokens."""

    def __init__(self, text: str) -> None:
        self.text, self.at, self.depth = text, 0, 0
        self.tokens: list[tuple[str, str, int]] = []
        at = 0
        while text[at:].strip():
            match = _TOKEN.match(text, at)
            if match is None:
                raise InputError(f"query {text!r}: {text[at:].strip()[0]!r} at character {at + 1} means nothing here")
            self.tokens.append((match.lastgroup or "", match[match.lastgroup or 0], match.start(match.lastgroup or 0)))
            at = match.end()

    def read(self) -> Query:
        if not self.tokens:
            return Query("all")
        query = self.many("|", lambda: self.many("&", self.inverse))
        if self.at < len(self.tokens):
            self.fail("& or |")
        return query

    def many(self, mark: str, part: Callable[[], Query]) -> Query:
        parts = [part()]
        while self.take(mark):
            parts.append(part())
        return parts[0] if len(parts) == 1 else Query(mark, tuple(parts))

    def inverse(self) -> Query:
        self.depth += 1
        if self.depth > DEEPEST:
            raise InputError(f"query {self.text[:60]!r}... has more than {DEEPEST} levels")
        if self.take("~"):
            query = Query("~", (self.inverse(),))
        else:
            query = self.value()
            if self.peek()[1] in COMPARE and self.peek()[0] == "mark":
                compare = self.next()[1]
                kind, number, _ = self.peek()
                if kind != "number":
                    self.fail("a number")
                self.at += 1
                query = Query(compare, (query,), value=float(number))
            elif query.op == "count":
                self.fail("a comparison of the count, as in count(#12) >= 2")
        self.depth -= 1
        return query

    def value(self) -> Query:
        kind, said, _ = self.peek()
        if self.take("("):
            query = self.many("|", lambda: self.many("&", self.inverse))
            self.want(")")
            return query
        if kind == "word" and said in CALLS and self.peek(1)[:2] == ("mark", "("):
            self.at += 2
            parts = [self.latent()]
            for _ in range(CALLS[said] - 1):
                self.want(",")
                parts.append(self.latent())
            self.want(")")
            return Query(said, tuple(parts))
        return self.latent()

    def latent(self) -> Query:
        kind, said, _ = self.next()
        modality = ""
        if kind == "modality":
            modality = said
            kind, said, _ = self.next()
        if kind == "latent":
            return Query("latent", latent=int(said[1:]), modality=modality)
        if kind == "quoted":
            return Query("name", name=re.sub(r"\\(.)", r"\1", said), modality=modality)
        if kind != "word":
            self.at -= 1
            self.fail('a latent (#12) or a name ("red circle")')
        words = [said]
        while self.peek()[0] == "word":
            words.append(self.next()[1])
        return Query("name", name=" ".join(words), modality=modality)

    def peek(self, ahead: int = 0) -> tuple[str, str, int]:
        end = ("", "", len(self.text))
        return self.tokens[self.at + ahead] if self.at + ahead < len(self.tokens) else end

    def next(self) -> tuple[str, str, int]:
        self.at += 1
        return self.peek(-1)

    def take(self, mark: str) -> bool:
        if self.peek()[:2] != ("mark", mark):
            return False
        self.at += 1
        return True

    def want(self, mark: str) -> None:
        if not self.take(mark):
            self.fail(mark)

    def fail(self, wanted: str) -> None:
        kind, said, at = self.peek()
        found = f"{said!r} at character {at + 1}" if kind else "its end"
        raise InputError(f"query {self.text!r}: {wanted} should stand where {found} is")


def parse(text: str) -> Query:
    """The tree of a query; see the head of this module for what may be written.

    Raises:
        InputError: Something else is written; the sentence says what and where.
    """
    return _Reader(text).read()


class LatentLists(Protocol):
    """Codes latent by latent, such as :meth:`mmsae.interpret.evidence.folder.Evidence.lists` or
    :class:`mmsae.metrics.concepts.inverted.InvertedLists`.
    """

    width: int  #: Number of items

    @property
    def n(self) -> int:
        """Number of latents."""

    def row(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Items on which a latent fires, each once, and its values there."""


class AreaMeasures(Protocol):
    """What areas of latents are asked for; ``latents`` are several where a name has several."""

    def count(self, latents: Sequence[int]) -> np.ndarray:
        """``(n,)`` number of areas in each item."""

    def left_of(self, a: Sequence[int], b: Sequence[int]) -> np.ndarray:
        """``(n,)`` how far it holds, in [0, 1], that an area of a lies left of one of b."""

    def overlap(self, a: Sequence[int], b: Sequence[int]) -> np.ndarray:
        """``(n,)`` largest overlap of an area of a with one of b, in [0, 1]."""


def on_grid(x: Any) -> Any:
    """Numbers rounded to multiples of 2^-23, on which ``1 - (1 - x)`` is x to the bit, so that the laws of logic hold
    exactly.
    """
    return np.rint(np.asarray(x, np.float64) * GRID) / GRID


def percentiles(values: np.ndarray, among: np.ndarray | None = None) -> np.ndarray:
    """``(m,) float32`` share of the values ``among`` (default: the same) that are at most as large in magnitude.

    All are above 0, also what is smaller than all of ``among``: it fires, if weakly.
    """
    size = np.abs(values)
    if among is None:
        order = np.argsort(size)
        share = np.empty(len(size))
        share[order] = np.searchsorted(size[order], size[order], "right") / max(len(size), 1)
    else:
        sizes = np.sort(np.abs(among))
        share = np.searchsorted(sizes, size, "right").clip(1) / len(sizes) if len(sizes) else np.ones(len(size))
    return on_grid(share).clip(1 / GRID).astype(np.float32)


def evaluate(
    query: Query | str,
    codes: Mapping[str, LatentLists],
    *,
    names: Mapping[int, str] | None = None,
    areas: AreaMeasures | None = None,
    calibration: Mapping[str, LatentLists] | None = None,
    holds: bool = False,
) -> np.ndarray:
    """``(n,) float32`` scores of items in [0, 1], or ``(n,) bool``, whether the query holds of them.

    Args:
        query: A tree, or its text.
        codes: ``{modality: codes of the same n items}``. Only the lists of the query's latents are read, and an item
            costs a few numbers, so that a million items with 64 latents each take a fraction of a second.
        names: Names of latents.
        areas: Areas of latents in the same items, for ``count``, ``left_of`` and ``overlap``.
        calibration: Codes whose percentiles count; default: ``codes`` themselves.
        holds: Ask for the truth in place of a score: a latent then counts as 1 where it fires, save in comparisons,
            which are of percentiles; so that ``#1 & ~#2`` is "1 fires and 2 is silent".

    Raises:
        InputError: A latent, a name or a modality that is not there, or a call without areas.
    """
    query = (parse(query) if isinstance(query, str) else query).bind(names or {})
    sizes = {m: lists.width for m, lists in codes.items()}
    if len(set(sizes.values())) != 1:
        raise InputError(f"a query needs codes of the same items, and there are {sizes or 'none'}")
    worker = _Evaluation(codes, areas, calibration or codes, next(iter(sizes.values())))
    return worker.score(query, fires=True) > 0.5 if holds else worker.score(query)


class _Evaluation:
    """One query over some codes; what a latent scores is computed once."""

    def __init__(self, codes: Mapping[str, LatentLists], areas: AreaMeasures | None, calibration: Any, n: int) -> None:
        self.codes, self.areas, self.calibration, self.n = codes, areas, calibration, n
        self.kept: dict[tuple[int, str, bool], np.ndarray] = {}

    def score(self, q: Query, fires: bool = False) -> np.ndarray:
        if q.op == "all":
            return np.ones(self.n, np.float32)
        if q.op == "latent":
            return self.latent(q.latent, q.modality, fires)
        if q.op == "~":
            inner = q.parts[0]
            return self.score(inner.parts[0], fires) if inner.op == "~" else 1 - self.score(inner, fires)
        if q.op in ("&", "|"):
            merge = np.minimum if q.op == "&" else np.maximum
            scores = (self.score(p, fires) for p in q.parts)
            out = next(scores).copy()
            for s in scores:
                merge(out, s, out=out)
            return out
        if q.op in COMPARE:
            return COMPARE[q.op](self.score(q.parts[0]), on_grid(q.value)).astype(np.float32)
        if self.areas is None:
            raise InputError(f"{q} is of areas, and there are none here: they come from the codes of patches")
        measured = on_grid(getattr(self.areas, q.op)(*(p.latents() for p in q.parts))).astype(np.float32)
        if measured.shape != (self.n,):
            raise InputError(f"{q} was measured of {measured.shape} items, and codes are of {self.n}")
        return measured

    def latent(self, j: int, modality: str, fires: bool) -> np.ndarray:
        key = (j, modality, fires)
        if key not in self.kept:
            if modality and modality not in self.codes:
                raise InputError(f"{modality}:#{j} asks for {modality}, and there are codes of {', '.join(self.codes)}")
            out = np.zeros(self.n, np.float32)
            for m in [modality] if modality else self.codes:
                if j >= self.codes[m].n:
                    raise InputError(f"there is no latent #{j}: the SAE has {self.codes[m].n}")
                items, values = self.codes[m].row(j)
                items, values = items[values != 0], values[values != 0]
                among = None if self.calibration is self.codes else self.calibration[m].row(j)[1]
                on = np.float32(1) if fires else percentiles(values, among)
                out[items] = np.maximum(out[items], on)
            self.kept[key] = out
        return self.kept[key]


class SavedQuery(NamedTuple):
    """What ``query.json`` holds: what the browser saves and ``mmsae filter --query`` takes."""

    query: Query
    sae: str = ""  #: Fingerprint of the SAE whose latents it is about; empty: not said
    name: str = ""  #: What a person called it


def write_query(path: str | Path, query: Query | str, sae: str, name: str = "") -> Path:
    """Write a query file and return its path; ``sae`` is the fingerprint of the SAE."""
    text = str(parse(query) if isinstance(query, str) else query)
    return write_json(path, {"format": FORMAT, "sae": sae, "query": text, "name": name})


def read_query(path: str | Path, sae: str = "") -> SavedQuery:
    """Read a query file.

    Args:
        path: What :func:`write_query` or the browser wrote.
        sae: Fingerprint of the SAE that it must be of; empty: any.

    Raises:
        InputError: No such file, a newer format, no query, or one over another SAE.
    """
    try:
        said = json.loads(read_text(path))
        text, own, name = said["query"], said.get("sae") or "", said.get("name") or ""
        newer = said.get("format", FORMAT) > FORMAT
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        if isinstance(e, InputError):
            raise
        raise InputError(f"{path} is no query file: it should be a JSON object with format, sae and query") from e
    if newer:
        raise InputError(f"{path} is a query of format {said['format']}; this mmsae reads up to {FORMAT}")
    if sae and own and own != sae:
        raise InputError(f"{path} is a query over SAE {str(own)[:12]}, and this is SAE {sae[:12]}")
    return SavedQuery(parse(str(text)), str(own), str(name))


def query_of(text: str, sae: str = "") -> Query:
    """A query that is written out, or that is in a file whose name ends in ``.json``; see :func:`read_query`."""
    return read_query(text, sae).query if text.endswith(".json") else parse(text)
