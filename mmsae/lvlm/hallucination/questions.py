"""POPE's questions about any set of images whose objects are known (Li et al., arXiv 2305.10355), and their scores."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mmsae.files import atomic_file, lines_of, read_text
from mmsae.lvlm.options import STRATEGIES, TEMPLATE, ImageLabels
from mmsae.metrics.host.hallucination import NO, PARSERS, YES, score_answers
from mmsae.shards import FaultLog, expand, read_shards
from mmsae.types import InputError


class Question(NamedTuple):
    """A yes/no question."""

    question_id: int  #: Number, from 1.
    image: str  #: Which image (a uid, or a file name in published files).
    text: str  #: The question.
    label: str  #: ``yes`` or ``no``.
    object: str = ""  #: What is asked for; empty in published files.


def ask(thing: str, template: str = TEMPLATE) -> str:
    """The question about an object; ``{a}`` becomes "an" before a vowel."""
    try:
        return template.format(a="an" if thing[:1].lower() in "aeiou" else "a", object=thing)
    except (LookupError, ValueError) as e:
        raise InputError(f"template {template!r} has something else in braces than a and object: {e}") from e


def names_of(objects: Any, fields: Sequence[str] = ()) -> list[str]:
    """Names in a json field of objects: a list of names, ``{name: count}``, or a list of dicts.

    ``fields`` of such a dict make the name, colour and shape say; else its ``category`` or ``name``.
    """
    out = []
    for o in objects or []:
        if isinstance(o, Mapping):
            own = [str(o[f]) for f in fields if o.get(f)] or [str(o[f]) for f in ("category", "name") if f in o][:1]
            if not own:
                raise InputError(f"an object has the fields {', '.join(map(str, o))}: say which of them make its name")
            out.append(" ".join(own))
        else:
            out.append(str(o))
    return out


def read_labels(
    shards: str | Sequence[str], labels: ImageLabels = ImageLabels()
) -> dict[str, tuple[list[str], list[str]]]:
    """``{uid: (object names, reference captions)}`` of the samples of some shards; images are not decoded.

    Raises:
        InputError: No sample has the field.
    """
    out, field = {}, labels.object_field
    for s in read_shards(expand(shards), FaultLog(), need=(), decode=False):
        if field in s.meta:
            out[s.uid] = names_of(s.meta[field], labels.object_names), s.meta.get("captions") or [s.caption]
    if not out:
        raise InputError(f"no sample of {shards} has the json field {field!r}, which names its objects")
    return out


def read_objects(shards: str | Sequence[str], labels: ImageLabels = ImageLabels()) -> dict[str, list[str]]:
    """``{uid: object names}``, see :func:`read_labels`."""
    return {uid: names for uid, (names, _) in read_labels(shards, labels).items()}


def build_pope(
    objects: Mapping[str, Sequence[str]],
    strategy: str = "random",
    images: int = 500,
    per_image: int = 3,
    min_objects: int = 3,
    seed: int = 0,
    template: str = TEMPLATE,
) -> list[Question]:
    """Questions about images, half of them true, from ``{image: names of its objects}``.

    Absent objects are chosen by ``strategy``: ``random``; ``popular``: those that most images have; ``adversarial``:
    those that most often occur with the object asked before. ``images`` is the number of images (all that have at least
    ``min_objects``, 3 in the original, where there are fewer), ``per_image`` that of objects asked for that are there,
    and as many that are not.

    Raises:
        InputError: An unknown strategy, or no image with enough objects there and absent.
    """
    if strategy not in STRATEGIES:
        raise InputError(f"strategy {strategy!r} is not one of {', '.join(STRATEGIES)}")
    sets = {i: sorted(set(o)) for i, o in sorted(objects.items())}
    frequency = Counter(o for own in sets.values() for o in own)
    together: dict[str, Counter] = {}
    for own in sets.values():
        for a, b in combinations(own, 2):
            together.setdefault(a, Counter())[b] += 1
            together.setdefault(b, Counter())[a] += 1
    names = sorted(frequency)
    by_frequency = sorted(names, key=lambda o: (-frequency[o], o))
    fit = [i for i, own in sets.items() if len(own) >= min_objects and len(own) < len(names)]
    if not fit:
        raise InputError(f"none of {len(sets)} images has at least {min_objects} objects and lacks one of {len(names)}")
    rng = np.random.default_rng([seed, STRATEGIES.index(strategy)])
    drawn = np.random.default_rng(seed)  # the same images and objects for every strategy
    out: list[Question] = []
    for k in sorted(drawn.permutation(len(fit))[:images].tolist()):
        own = sets[fit[k]]
        left = [o for o in names if o not in own]
        there = [own[j] for j in drawn.permutation(len(own))[: min(per_image, len(left))]]
        for thing in there:
            out.append(Question(len(out) + 1, fit[k], ask(thing, template), YES, thing))
            if strategy == "random":
                absent = left[int(rng.integers(len(left)))]
            else:
                near = together.get(thing, Counter())
                order = by_frequency if strategy == "popular" else sorted(by_frequency, key=lambda o: -near[o])
                absent = next(o for o in order if o in left)
            left.remove(absent)
            out.append(Question(len(out) + 1, fit[k], ask(absent, template), NO, absent))
    return out


def save_questions(questions: Sequence[Question], path: str | Path) -> Path:
    """Write one JSON object a line, as published."""
    with atomic_file(path) as temp:
        temp.write_text("".join(json.dumps(q._asdict()) + "\n" for q in questions))
    return Path(path)


def load_questions(path: str | Path) -> list[Question]:
    """Read questions, ours or the published files.

    Raises:
        InputError: Not such a file; names the line.
    """
    out = []
    for n, line in enumerate(lines_of(read_text(path)), 1):
        try:
            q = json.loads(line)
            label = str(q["label"]).strip().lower()
            out.append(Question(q["question_id"], str(q["image"]), str(q["text"]), label, q.get("object", "")))
        except (ValueError, KeyError, TypeError) as e:
            raise InputError(f"line {n} of {path} is no question with question_id, image, text and label") from e
        if label not in (YES, NO):
            raise InputError(f"line {n} of {path} has the label {q['label']!r}, which is neither yes nor no")
    return out


def by_image(sets: Mapping[str, Sequence[Question]]) -> dict[str, list[tuple[str, Question]]]:
    """``{image: (strategy, question) of it}``."""
    out: dict[str, list[tuple[str, Question]]] = {}
    for strategy, questions in sets.items():
        for q in questions:
            out.setdefault(q.image, []).append((strategy, q))
    return out


def check_images(sets: Mapping[str, Sequence[Question]], shards: str | Sequence[str]) -> None:
    """Refuse questions about a key that several samples have: they would be asked about one and scored for another.

    Raises:
        InputError: Names the key and two of its shards.
    """
    asked, at = by_image(sets).keys(), {}
    for s in read_shards(expand(shards), FaultLog(), need=(), decode=False):
        for image in {s.uid, s.key} & asked:
            if first := at.get(image):
                raise InputError(
                    f"questions are about {image}, which is a sample of {first} and one of {s.shard}: name their uids"
                )
            at[image] = s.shard


def score_methods(
    answers: Mapping[str, Mapping[str, str]], questions: Sequence[Question], strategy: str
) -> dict[str, dict[str, dict[str, float]]]:
    """``{method: {parser: figures}}`` of the questions that were answered (their images are in the shards)."""
    out = {}
    for method, said in answers.items():
        own = [(said[i], q.label) for q in questions if (i := f"{strategy}/{q.question_id}") in said]
        if own:
            given, wanted = zip(*own, strict=True)
            out[method] = {p: score_answers(given, wanted, p)._asdict() for p in PARSERS}
    return out
