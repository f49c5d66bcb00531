"""Captions of scenes: full, partial, and wrong on purpose; and which concepts a caption mentions."""

from __future__ import annotations

import re

import numpy as np

from mmsae.world.generator.scene import (
    BACKGROUNDS,
    COLOURS,
    CONCEPTS,
    OBJECT_ATTRIBUTES,
    RELATIONS,
    SHAPES,
    SIZES,
    TEXTURES,
    Scenes,
    change_one,
)

PLACES = ("on the left", "on the right", "at the top", "at the bottom", "in the center")  # of POSITIONS
CONVERSE = ("right of", "below")  # of RELATIONS, with the objects exchanged
P_DROP = 0.3


def _object(value: list[int], keep: list[bool]) -> str:
    """``a large striped red circle``, without the attributes that are not kept; ``a shape`` where the noun is not."""
    shape, colour, size, texture = value
    words = [SIZES[size]] * keep[2] + [TEXTURES[texture]] * keep[3] + [COLOURS[colour]] * keep[1]
    return " ".join(["a", *words, SHAPES[shape] if keep[0] else "shape"])


def full_captions(scenes: Scenes) -> list[str]:
    """Every attribute, in a fixed order: a function of the scene, equal where all attributes are equal."""
    keep = np.ones((scenes.n, 11), bool)
    return _write(scenes, keep, np.zeros((scenes.n, 2), bool))


def partial_captions(scenes: Scenes, seed: int) -> list[str]:
    """Each attribute left out with probability .3; half of the relations told from the other side."""
    rng = np.random.default_rng([seed, 3])
    return _write(scenes, rng.random((scenes.n, 11)) >= P_DROP, rng.random((scenes.n, 2)) < 0.5)


def _write(scenes: Scenes, keep: np.ndarray, turn: np.ndarray) -> list[str]:
    """Put captions together.

    ``keep (n, 11) bool``: four attributes of each object, background, position, relation. ``turn (n, 2) bool``: whether
    the objects are told in the other order, with their relation, without it.
    """
    out = []
    columns = (scenes.objects, scenes.background, scenes.position, scenes.relation, keep, turn)
    for objects, ground, position, relation, k, t in zip(*(c.tolist() for c in columns), strict=True):
        first = _object(objects[0], k[:4])
        if relation < 0:
            text = f"{first} {PLACES[position]}" if k[9] else first
        else:
            second = _object(objects[1], k[4:8])
            link = (CONVERSE[relation] if t[0] else RELATIONS[relation]) if k[10] else "and"
            text = f"{second} {link} {first}" if t[0 if k[10] else 1] else f"{first} {link} {second}"
        out.append(f"{text} on a {BACKGROUNDS[ground]} background" if k[8] else text)
    return out


def damage(scenes: Scenes, seed: int) -> tuple[list[str], list[str]]:
    """Full captions in which exactly one attribute of object 0 is wrong, and the name of that attribute in each."""
    wrong = change_one(scenes, seed, which_object=0)
    names = list(OBJECT_ATTRIBUTES)
    return full_captions(wrong), [names[a] for a in wrong.changed]


def swap(captions: list[str], seed: int, share: float = 0.3) -> tuple[list[str], np.ndarray]:
    """Give a share of the samples the caption of another sample that reads differently.

    Returns:
        The captions, and ``(n,) bool``: whose is wrong.

    Raises:
        ValueError: All captions are equal.
    """
    rng = np.random.default_rng([seed, 4])
    text = np.array(captions, dtype=object)
    if len(set(captions)) < 2:
        raise ValueError("captions cannot be swapped: all are equal")
    chosen = rng.permutation(len(captions))[: round(share * len(captions))]
    donor = rng.integers(0, len(captions), size=len(chosen))
    while (same := text[donor] == text[chosen]).any():
        donor[same] = rng.integers(0, len(captions), size=int(same.sum()))
    out, wrong = text.copy(), np.zeros(len(captions), bool)
    out[chosen], wrong[chosen] = text[donor], True
    return out.tolist(), wrong


_WORDS = {name: re.compile(rf"\b{name}\b") for name in CONCEPTS}
_WORDS |= {name: re.compile(p) for name, p in zip(("left", "right", "top", "bottom", "center"), PLACES, strict=True)}
_WORDS |= {
    "left of": re.compile("left of|right of"),
    "above": re.compile("above|below"),
    "two objects": re.compile(" (of|above|below|and) "),
}


def mentions(captions: list[str]) -> np.ndarray:
    """``(n, 26) bool``: which concepts each caption tells; the truth to score text codes against."""
    unique, inverse = np.unique(np.array(captions, dtype=object).astype(str), return_inverse=True)
    table = np.array([[_WORDS[c].search(text) is not None for c in CONCEPTS] for text in unique.tolist()], bool)
    return table.reshape(-1, len(CONCEPTS))[inverse]
