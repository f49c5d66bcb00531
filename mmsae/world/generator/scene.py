"""Scenes of the generated world: what is where, as arrays, and the concepts that are true of them.

A scene has one or two objects on a plain ground. Everything is drawn for all scenes at once and kept as a structure of
arrays, so that truth tables, renders and captions are all read from the same few integers.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

SHAPES = ("circle", "square", "triangle", "cross", "ring")
COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan")
SIZES = ("small", "large")
TEXTURES = ("solid", "striped")
BACKGROUNDS = ("dark", "gray", "light")
POSITIONS = ("left", "right", "top", "bottom", "center")
RELATIONS = ("left of", "above")

#: Attributes of an object, in the order of the last axis of ``Scenes.objects``.
OBJECT_ATTRIBUTES = {"shape": SHAPES, "colour": COLOURS, "size": SIZES, "texture": TEXTURES}
#: Concepts by group. A position belongs to a lone object, a relation to two; "two objects" is counted with relations.
CONCEPT_GROUPS = {
    **OBJECT_ATTRIBUTES,
    "background": BACKGROUNDS,
    "position": POSITIONS,
    "relation": (*RELATIONS, "two objects"),
}
#: The 26 concept names, in the order of the columns of the truth matrix.
CONCEPTS = tuple(name for names in CONCEPT_GROUPS.values() for name in names)
#: ``{group: column ids}``.
GROUP_COLUMNS = {g: tuple(CONCEPTS.index(name) for name in names) for g, names in CONCEPT_GROUPS.items()}

P_TWO = 0.4
#: How siblings differ: shape most often, since it is the attribute that a small CLIP learns last.
SIBLING_WEIGHTS = {"shape": 0.45, "colour": 0.2, "size": 0.15, "texture": 0.2}

_COUNTS = np.array([len(v) for v in OBJECT_ATTRIBUTES.values()])
_COLOUR = list(OBJECT_ATTRIBUTES).index("colour")
_RADIUS = np.array([[5.2, 9.0], [4.6, 7.2]])  # pixels, [alone | two objects][small | large]
_ALONE = np.array([[9.5, 16], [22.5, 16], [16, 9.5], [16, 22.5], [16, 16]])  # (x, y) of POSITIONS
_PAIRED = np.array([[[8, 16], [24, 16]], [[16, 8], [16, 24]]])  # (x, y) of objects 0 and 1 for RELATIONS


class Scenes(NamedTuple):
    """``n`` scenes; -1 stands for "there is none"."""

    #: ``(n, 2, 4) int8`` value ids of shape, colour, size and texture; object 1 is -1 in scenes of one
    objects: np.ndarray
    background: np.ndarray  #: ``(n,) int8`` index into BACKGROUNDS
    position: np.ndarray  #: ``(n,) int8`` index into POSITIONS of a lone object
    relation: np.ndarray  #: ``(n,) int8`` index into RELATIONS, object 0 to object 1
    centre: np.ndarray  #: ``(n, 2, 2) float32`` x, y in pixels of a 32 x 32 image
    radius: np.ndarray  #: ``(n, 2) float32`` pixels
    pair: np.ndarray  #: ``(n,) int64`` siblings share a number
    changed: np.ndarray  #: ``(n,) int8`` the object attribute in which a scene differs from the one it was made from

    @property
    def n(self) -> int:
        """Number of scenes."""
        return len(self.background)

    @property
    def two(self) -> np.ndarray:
        """``(n,) bool`` scenes of two objects."""
        return self.relation >= 0

    def rows(self, which: np.ndarray | slice) -> Scenes:
        """The scenes that an index array, a mask or a slice names."""
        return Scenes(*(a[which] for a in self))


def _radius(objects: np.ndarray, jitter: np.ndarray) -> np.ndarray:
    two = (objects[:, 1, 0] >= 0).astype(int)
    return (_RADIUS[two[:, None], objects[:, :, 2]] + jitter).astype(np.float32)


def sample_scenes(n: int, seed: int, *, siblings: bool = True) -> Scenes:
    """Draw ``n`` scenes, a function of the arguments.

    With ``siblings`` rows 2i and 2i+1 are one scene and its copy with exactly one object attribute changed, the hard
    negatives without which a small CLIP does not learn shape. Otherwise all scenes are drawn independently.
    """
    rng = np.random.default_rng([seed, 0])
    m = -(-n // 2) if siblings else n
    two = rng.random(m) < P_TWO
    objects = rng.integers(0, _COUNTS, size=(m, 2, 4)).astype(np.int8)
    shift = rng.integers(1, len(COLOURS), size=m)  # the two objects of a scene never share a colour
    objects[:, 1, _COLOUR] = (objects[:, 0, _COLOUR] + shift) % len(COLOURS)
    objects[~two, 1] = -1
    background = rng.integers(0, len(BACKGROUNDS), size=m).astype(np.int8)
    position = np.where(two, -1, rng.integers(0, len(POSITIONS), size=m)).astype(np.int8)
    relation = np.where(two, rng.integers(0, len(RELATIONS), size=m), -1).astype(np.int8)
    centre = np.where(two[:, None, None], _PAIRED[relation], _ALONE[position][:, None])
    centre = centre + rng.uniform(-1, 1, size=(m, 2, 2)) * np.where(two, 1.0, 1.5)[:, None, None]
    radius = _radius(objects, rng.uniform(-0.4, 0.4, size=(m, 2)))
    pair = np.arange(m)
    first = Scenes(
        objects, background, position, relation, centre.astype(np.float32), radius, pair, np.full(m, -1, np.int8)
    )
    if not siblings:
        return first
    second = change_one(first, seed, weights=SIBLING_WEIGHTS)
    return Scenes(*(np.stack([a, b], 1).reshape(2 * m, *a.shape[1:])[:n] for a, b in zip(first, second, strict=True)))


def change_one(
    scenes: Scenes, seed: int, *, which_object: int | None = None, weights: dict[str, float] | None = None
) -> Scenes:
    """Copies that differ in exactly one attribute of one object.

    Args:
        scenes: The originals.
        seed: Everything follows from it.
        which_object: 0 or 1; None draws it (0 in scenes of one).
        weights: ``{attribute: probability}``; equal where None.
    """
    rng = np.random.default_rng([seed, 1])
    n, row = scenes.n, np.arange(scenes.n)
    p = [weights[a] for a in OBJECT_ATTRIBUTES] if weights else None
    attribute = rng.choice(len(OBJECT_ATTRIBUTES), size=n, p=p)
    drawn = np.where(scenes.two, rng.integers(0, 2, size=n), 0)
    obj = drawn if which_object is None else np.full(n, which_object)
    old, other = scenes.objects[row, obj, attribute].astype(int), scenes.objects[row, 1 - obj, attribute].astype(int)
    count = _COUNTS[attribute]
    # One of the values left: not the old one and, for colours, not that of the other object.
    forbidden = np.where((attribute == _COLOUR) & scenes.two, (other - old) % count, count)
    free = count - 1 - (forbidden < count)
    step = 1 + (rng.random(n) * free).astype(int)
    step += step >= forbidden
    objects = scenes.objects.copy()
    objects[row, obj, attribute] = (old + step) % count
    jitter = scenes.radius - _radius(scenes.objects, np.zeros((n, 2)))
    return scenes._replace(objects=objects, radius=_radius(objects, jitter), changed=attribute.astype(np.int8))


def concept_matrix(scenes: Scenes) -> np.ndarray:
    """``(n, 26) bool``: which concepts are true of each scene; a scene of two objects has those of both."""
    truth = np.zeros((scenes.n, len(CONCEPTS)), dtype=bool)

    def mark(group: str, value: np.ndarray) -> None:
        on = np.flatnonzero(value >= 0)
        truth[on, np.asarray(GROUP_COLUMNS[group])[value[on]]] = True

    for j in range(2):
        for a, group in enumerate(OBJECT_ATTRIBUTES):
            mark(group, scenes.objects[:, j, a])
    mark("background", scenes.background)
    mark("position", scenes.position)
    mark("relation", scenes.relation)
    truth[:, CONCEPTS.index("two objects")] = scenes.two
    return truth
