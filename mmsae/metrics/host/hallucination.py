"""POPE: yes/no answers about objects, read by three named parsers; accuracy, precision, recall, F1 and yes-ratio.

The parsers of published code disagree, so the one that was used is part of every result. ``yes`` is the positive class.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from mmsae.types import InputError

YES, NO = "yes", "no"
PARSERS = ("official", "substring", "strict")
_STRICT = re.compile(r"\W*(yes|no)\b", re.IGNORECASE)


def parse_answer(answer: str, label: str = YES, parser: str = "official") -> str | None:
    """``yes``, ``no``, or None where the answer is neither.

    Args:
        answer: What the model said.
        label: The truth, which ``substring`` looks for.
        parser: ``official`` (RUCAIBox/POPE): the first sentence, commas removed; "no" where one of its words is No, no
            or not, else "yes" - so "NO" and "There isn't one" are "yes". ``substring`` (VCD, VL-SAE): right where the
            label is a part of the lower-cased answer - so "nothing" is right for "no". ``strict``: the first word is
            yes or no, else None.

    Raises:
        InputError: An unknown parser or label.
    """
    if label not in (YES, NO):
        raise InputError(f"label {label!r} of a question is neither yes nor no")
    if parser == "official":
        words = answer.split(".")[0].replace(",", "").split(" ")
        return NO if {"No", "not", "no"} & set(words) else YES
    if parser == "substring":
        return label if label in answer.lower() else (NO if label == YES else YES)
    if parser == "strict":
        found = _STRICT.match(answer)
        return found[1].lower() if found else None
    raise InputError(f"parser {parser!r} is not one of {', '.join(PARSERS)}")


class PopeReport(NamedTuple):
    """Figures of a set of yes/no questions."""

    accuracy: float  #: Share of right answers; an unparsed one is wrong
    precision: float  #: Share of "yes" answers that are right
    recall: float  #: Share of "yes" questions that were answered so
    f1: float  #: Harmonic mean of the two
    yes_ratio: float  #: Share of "yes" answers; far from .5 it is a bias rather than sight
    unparsed: int  #: Answers that are neither
    n: int  #: Questions


def _ratio(a: float, b: float) -> float:
    return a / b if b else 0.0


def pope_report(predictions: Sequence[str | None], labels: Sequence[str]) -> PopeReport:
    """Figures from parsed answers and labels.

    Raises:
        InputError: Different numbers of them, or none.
    """
    if len(predictions) != len(labels) or not labels:
        raise InputError(f"{len(predictions)} answers for {len(labels)} questions")
    pairs = list(zip(predictions, labels, strict=True))
    hits, said, asked = pairs.count((YES, YES)), sum(p == YES for p in predictions), labels.count(YES)
    right = hits + pairs.count((NO, NO))
    precision, recall = _ratio(hits, said), _ratio(hits, asked)
    f1 = _ratio(2 * precision * recall, precision + recall)
    unparsed = sum(p is None for p in predictions)
    return PopeReport(right / len(pairs), precision, recall, f1, said / len(pairs), unparsed, len(pairs))


def score_answers(answers: Sequence[str], labels: Sequence[str], parser: str = "official") -> PopeReport:
    """:func:`pope_report` of raw answers."""
    if len(answers) != len(labels):
        raise InputError(f"{len(answers)} answers for {len(labels)} questions")
    return pope_report([parse_answer(a, label, parser) for a, label in zip(answers, labels, strict=True)], list(labels))
