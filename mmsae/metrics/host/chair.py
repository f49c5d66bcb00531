"""CHAIR: objects that a caption mentions and the image does not have (Rohrbach et al., EMNLP 2018).

The original needs Python 2 and two language packages whose versions change results; here words are singularised by a
frozen table (``singular.json``) and synonyms come from a file in the original's form.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from mmsae.files import lines_of, read_text
from mmsae.types import InputError

_WORD = re.compile(r"[a-z0-9]+(?:-[a-z0-9]+)*")
#: Word pairs that the original treats as one word.
PAIRS = tuple(
    "motor bike,motor cycle,air plane,traffic light,street light,traffic signal,stop light,fire hydrant,stop sign,"
    "parking meter,suit case,sports ball,baseball bat,baseball glove,tennis racket,wine glass,hot dog,cell phone,"
    "mobile phone,teddy bear,hair drier,potted plant,laptop computer,home plate".split(",")
)
_ANIMALS = "bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,animal,cub".split(",")
#: Pairs whose first word would be taken for a person, or whose second for another thing.
QUALIFIED = {f"{age} {a}": a for age in ("baby", "adult") for a in _ANIMALS} | {
    "passenger jet": "jet", "passenger train": "train", "bow tie": "tie", "toilet seat": "toilet"
}  # fmt: skip


@cache
def _table() -> dict[str, Any]:
    return json.loads(files("mmsae.metrics.host").joinpath("singular.json").read_text())


def singular(word: str) -> str:
    """Singular of a lower-case English noun, by the frozen table: exceptions first, then the first ending that fits."""
    table = _table()
    if word in table["irregular"]:
        return table["irregular"][word]
    if word in table["keep"] or len(word) < 3:
        return word
    for ending, new in table["suffixes"]:
        if word.endswith(ending) and len(word) > len(ending):
            return word[: len(word) - len(ending)] + new
    return word


class Objects(NamedTuple):
    """Which words mean which object."""

    name: dict[str, str]  #: ``{term: object}``, terms singular and in lower case, of one or several words
    pairs: dict[str, str]  #: ``{two words: the term that they stand for}``, merged before anything is looked up
    longest: int  #: Words of the longest term

    @classmethod
    def of(cls, lines: Iterable[Sequence[str]], published: bool = True) -> Objects:
        """Make the objects of lists of synonyms, each with the object's own name first.

        ``published`` merges the original's fixed pairs only; else every term of several words is found.
        """
        name: dict[str, str] = {}
        for terms in lines:
            own = [t.strip().lower() for t in terms if t.strip()]
            for t in own:
                name[t] = own[0]
                name.setdefault(" ".join(map(singular, t.split())), own[0])
        pairs = {p: p for p in PAIRS} | QUALIFIED if published else {}
        return cls(name, pairs, 1 if published else max((len(t.split()) for t in name), default=1))

    @classmethod
    def read(cls, path: str | Path, published: bool = True) -> Objects:
        """Read a file with one object a line, its name and synonyms separated by commas.

        Raises:
            InputError: No such file, or nothing in it.
        """
        lines = [line.split(",") for line in lines_of(read_text(path)) if line.strip()]
        if not lines:
            raise InputError(f"{path} holds no synonyms")
        return cls.of(lines, published)

    def mentions(self, caption: str) -> list[str]:
        """Objects that a caption mentions, in order, with repetition."""
        words, merged, i = [singular(w) for w in _WORD.findall(caption.lower())], [], 0
        while i < len(words):
            pair = " ".join(words[i : i + 2])
            merged.append(self.pairs.get(pair, words[i]))
            i += 2 if pair in self.pairs else 1
        if "toilet" in merged:
            merged = [w for w in merged if w != "seat"]
        out, i = [], 0
        while i < len(merged):
            for n in range(self.longest, 0, -1):
                term = " ".join(merged[i : i + n])
                if term in self.name:
                    out.append(self.name[term])
                    break
            else:
                n = 1
            i += n
        return out

    def canonical(self, names: Iterable[str]) -> set[str]:
        """Annotated names as objects; unknown ones stay as they are."""
        return {self.name.get(n.lower(), n.lower()) for n in names}

    def truth(self, annotated: Iterable[str], references: Iterable[str] = ()) -> set[str]:
        """What an image has: its annotated objects and those that its reference captions mention."""
        return self.canonical(annotated).union(*(self.mentions(r) for r in references))


class ChairReport(NamedTuple):
    """Figures of a set of captions; lower is better for the first two, which short captions win for free."""

    chair_s: float  #: Share of captions with a hallucinated object
    chair_i: float  #: Share of mentions (with repetition) that are hallucinated; 0 without mentions
    recall: float  #: Share of the images' objects that are mentioned
    length: float  #: Mean number of words
    mentions: int  #: Mentions
    n: int  #: Captions


def hallucinated(caption: str, truth: set[str], objects: Objects) -> list[str]:
    """Objects that a caption mentions and ``truth`` lacks, with repetition."""
    return [m for m in objects.mentions(caption) if m not in truth]


def chair(captions: Mapping[str, str], truth: Mapping[str, set[str]], objects: Objects) -> ChairReport:
    """CHAIR of captions ``{image: caption}``; for ``{image: objects that it has}`` see :meth:`Objects.truth`.

    Raises:
        InputError: No captions, or one of an image whose objects are not known.
    """
    if not captions or (unknown := set(captions) - set(truth)):
        what = f"the objects of image {min(unknown)} are not known" if captions else "there are no captions"
        raise InputError(f"CHAIR: {what}")
    mentions = {i: objects.mentions(c) for i, c in captions.items()}
    wrong = {i: sum(m not in truth[i] for m in said) for i, said in mentions.items()}
    total = sum(map(len, mentions.values()))
    found = sum(len(truth[i] & set(said)) for i, said in mentions.items())
    return ChairReport(
        sum(n > 0 for n in wrong.values()) / len(captions),
        sum(wrong.values()) / max(total, 1),
        found / max(sum(len(truth[i]) for i in captions), 1),
        sum(len(c.split()) for c in captions.values()) / len(captions),
        total,
        len(captions),
    )
