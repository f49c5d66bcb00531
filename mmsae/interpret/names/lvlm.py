"""Names by asking a language or vision-language model that is shown the evidence (method ``lvlm``).

Images: examples of all strengths under their heat, crops of where the latent is strongest, and silent images that look
alike; texts: examples with the strong tokens marked, as Delphi shows them (arXiv 2410.13928). The answer is JSON; what
is no JSON, or says that there is nothing, is an abstention, never a name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from mmsae.interpret.clients.asked import Asked
from mmsae.interpret.clients.client import Message
from mmsae.interpret.clients.parse import concept
from mmsae.interpret.names.choose import Examples
from mmsae.interpret.shown import ItemViews, encoded
from mmsae.types import IMAGE

SYSTEM = (
    "You name what a unit of a neural network responds to. Be short and specific: a word or a few, no sentence. If the "
    "examples have nothing in common, say so by a concept of null."
)
ASK = (
    'What do the examples that the unit responds to have in common, which the others lack? Answer in JSON: {"concept": '
    '"a word or a few, or null", "where": "where in the examples", "others_lack": "what the others lack"}.'
)
POSITIVES, CROPS, OTHERS = 6, 3, 5


class Shown(NamedTuple):
    """How many examples a question shows."""

    positive: int = POSITIVES  #: Examples on which the latent fires, evenly over its strengths
    crops: int = CROPS  #: Of the strongest, what is around the place
    other: int = OTHERS  #: Silent examples that look alike


def spread(items: np.ndarray, n: int) -> list[int]:
    """``n`` of the items of a row (-1 for none), evenly from the first to the last."""
    items = items[items >= 0]
    if len(items) <= n:
        return items.tolist()
    return items[np.linspace(0, len(items) - 1, n).round().astype(int)].tolist()


def question(latent: int, views: ItemViews, own: Examples, shown: Shown = Shown()) -> list[Message]:
    """What is asked about one latent; ``own`` are its examples of the train half, one row each."""
    others = own.hard if (own.hard >= 0).any() else own.negative
    positive = spread(own.positive[0], shown.positive)
    parts = [("The unit responds to these:", [views.marked(i, latent) for i in positive])]
    crops = [c for i in positive[: shown.crops] if (c := views.crop(i, latent)) is not None]
    if crops:
        parts.append(("It is strongest at these places of the first of them:", [("", encoded(c)) for c in crops]))
    silent = [views.plain(i) for i in spread(others[0], shown.other)]
    parts.append(("It does not respond to these, which are like them:", silent))
    marks = ""
    if views.places:
        marks = "Where it responds is red." if views.modality == IMAGE else "What it responds to is between << and >>."
    lines, images, number = [marks] if marks else [], [], 0
    for title, examples in parts:
        lines.append(title)
        for text, image in examples:
            number += 1
            lines.append(f"{number}. {text or f'image {number}'}")
            images += [] if image is None else [image]
    return [Message("system", SYSTEM), Message("user", "\n".join([*lines, "", ASK]), tuple(images))]


def explained(
    latents: Sequence[int], views: ItemViews, train: Examples, asked: Asked, done: Callable[[], object] = lambda: None
) -> dict[int, str]:
    """``{latent: name}`` of those for which the model has one; ``train`` has the examples of all latents."""
    questions = [question(j, views, train.of(np.array([j]))) for j in latents]
    out = {}
    for j, text in zip(latents, asked.chat(questions, done), strict=True):
        if text is None:
            continue
        if name := concept(text):
            out[j] = name
        elif name is None:
            asked.count_nonsense()
        else:
            asked.count_abstained()
    return out
