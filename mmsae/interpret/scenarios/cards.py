"""Scene cards: what an item shows, field by field, with the evidence for it from the image and from its caption.

The fixed schema and the self-validation of TRACE (arXiv 2502.02025), without a language model: what image and caption
both say agrees, what only one says is noted, and what they say against each other is a conflict (reconstructed).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mmsae.files import read_text
from mmsae.metrics.concepts.query import percentiles
from mmsae.types import IMAGE, TEXT, InputError

if TYPE_CHECKING:
    from mmsae.interpret.areas.relations import CorpusAreas
    from mmsae.interpret.evidence.folder import Evidence

DEFAULT = Path(__file__).with_name("groups.yaml")
AGREE, IMAGE_ONLY, TEXT_ONLY, CONFLICT = "agree", "image_only", "text_only", "conflict"


class FieldGroup(NamedTuple):
    """A field of the cards."""

    one: bool  #: Whether a scene has one value only, so that two contradict each other
    values: dict[str, list[str]]  #: Words for each value


def read_groups(path: str | Path = "") -> dict[str, FieldGroup]:
    """Fields of cards from a YAML file; empty: the package's own.

    Raises:
        InputError: Another form; the sentence names the group.
    """
    import yaml

    path = path or DEFAULT
    try:
        said = yaml.safe_load(read_text(path))
    except yaml.YAMLError as e:
        raise InputError(f"{path} is no YAML file: {e}") from e
    if not isinstance(said, dict) or not said:
        raise InputError(f"{path} has no groups: it should map names of groups to their values")
    out = {}
    for name, group in said.items():
        values = group.get("values") if isinstance(group, dict) else None
        if not isinstance(values, dict) or not all(isinstance(w, list) and w for w in values.values()):
            raise InputError(f"{path}: group {name!r} needs values, each a list of the words for it")
        table = {str(v): [str(w).casefold() for w in words] for v, words in values.items()}
        out[str(name)] = FieldGroup(bool(group.get("one", False)), table)
    return out


def _pattern(words: Sequence[str]) -> re.Pattern:
    return re.compile(r"\b(?:" + "|".join(re.escape(w) for w in sorted(words, key=len, reverse=True)) + r")\b", re.I)


class Cards:
    """Makes scene cards of the items of a folder of evidence.

    Args:
        evidence: The items, their codes and captions.
        names: Names of latents.
        groups: Fields.
        present: Percentile that a latent's value has to exceed to be evidence.
        areas: Areas of latents, for counts and boxes.
    """

    def __init__(
        self, evidence: Evidence, names: Mapping[int, str], groups: Mapping[str, FieldGroup], present: float = 0.5,
        areas: CorpusAreas | None = None,
    ):  # fmt: skip
        self.evidence, self.names, self.groups, self.areas = evidence, names, groups, areas
        self.words = {(g, v): _pattern(words) for g, group in groups.items() for v, words in group.values.items()}
        self.latents = {
            key: [j for j, name in sorted(names.items()) if pattern.search(name)] for key, pattern in self.words.items()
        }
        wanted = sorted({j for some in self.latents.values() for j in some})
        self._scores = {m: self._scored(m, wanted, present) for m in evidence.modalities}

    def _scored(self, modality: str, latents: Sequence[int], present: float) -> dict[int, dict[int, float]]:
        """``{latent: {item: percentile}}`` of values that are evidence."""
        lists = self.evidence.lists(modality)
        out = {}
        for j in latents:
            items, values = lists.row(j)
            share = percentiles(values)
            on = (share > present) & (values != 0)
            out[j] = dict(zip(items[on].tolist(), share[on].tolist(), strict=True))
        return out

    def card(self, item: int, **more: Any) -> dict[str, Any]:
        """The card of one item; ``more`` (query, rarity, criticality) is added to it.

        Its ``fields`` are, by group, the values with their evidence: source, latent, score, and of images with areas
        the count and the boxes. ``validation`` says of every value whether image and caption agree.
        """
        items = self.evidence.items
        caption = items.caption[item]
        fields: dict[str, list[dict[str, Any]]] = {}
        validation: dict[str, dict[str, str]] = {}
        for name, group in self.groups.items():
            found = {v: self._evidence((name, v), item, caption) for v in group.values}
            found = {v: e for v, e in found.items() if e}
            if not found:
                continue
            sides = {v: {e["source"] for e in some} for v, some in found.items()}
            seen, told = ({v for v, s in sides.items() if side in s} for side in (IMAGE, "caption"))
            clash = group.one and seen and told and not seen & told
            validation[name] = {v: CONFLICT if clash else _verdict(s) for v, s in sides.items()}
            fields[name] = [{"value": v, "evidence": e} for v, e in found.items()]
        return {
            "id": items.uid[item], "caption": caption, "fields": fields, "validation": validation,
            "conflict": any(CONFLICT in v.values() for v in validation.values()), **more,
        }  # fmt: skip

    def _evidence(self, key: tuple[str, str], item: int, caption: str) -> list[dict[str, Any]]:
        out: list[dict[str, Any]] = []
        for modality, source in ((IMAGE, IMAGE), (TEXT, "caption")):
            scores = self._scores.get(modality, {})
            for j in self.latents[key]:
                if item in scores.get(j, {}):
                    said = {"source": source, "latent": j, "name": self.names[j], "score": round(scores[j][item], 4)}
                    out.append(said | (self._where(j, item) if source == IMAGE else {}))
        if (word := self.words[key].search(caption)) is not None:
            out.append({"source": "caption", "word": word[0]})
        return out

    def _where(self, latent: int, item: int) -> dict[str, Any]:
        if self.areas is None or not self.areas.known[item]:
            return {}
        items, found = self.areas.areas([latent])
        own = slice(*np.searchsorted(items, (item, item + 1)))
        return {"count": own.stop - own.start, "boxes": np.round(found.box[own], 4).tolist()}


def _verdict(sides: set[str]) -> str:
    return AGREE if len(sides) > 1 else IMAGE_ONLY if IMAGE in sides else TEXT_ONLY


def verdicts(cards: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """``{group: {verdict: number}}`` over cards."""
    out: dict[str, dict[str, int]] = {}
    for card in cards:
        for group, values in card["validation"].items():
            counts = out.setdefault(group, dict.fromkeys((AGREE, IMAGE_ONLY, TEXT_ONLY, CONFLICT), 0))
            for verdict in values.values():
                counts[verdict] += 1
    return out
