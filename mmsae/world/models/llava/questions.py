"""What the tiny LLaVA is taught and asked: captions, and yes/no questions about objects."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from mmsae.shards import FAULT_LIMIT, FaultLog, expand, read_shard
from mmsae.types import InputError
from mmsae.world.generator.data import WorldData
from mmsae.world.generator.scene import COLOURS, OBJECT_ATTRIBUTES, SHAPES, Scenes

DESCRIBE = "describe the image."
YES, NO = "yes", "no"
#: The 30 objects that questions are about, colour by colour.
OBJECTS = tuple(f"{c} {s}" for c, s in product(COLOURS, SHAPES))
Negatives = Literal["random", "adversarial", "popular"]
_SHAPE, _COLOUR = (list(OBJECT_ATTRIBUTES).index(a) for a in ("shape", "colour"))


def ask(thing: str) -> str:
    """The question whether an object is there: ``is there a red circle?``."""
    return f"is there a {thing}?"


class Questions(NamedTuple):
    """Yes/no questions about images."""

    row: np.ndarray  #: ``(m,) int64`` which image
    texts: list[str]  #: The ``m`` questions
    answers: np.ndarray  #: ``(m,) bool``, true for yes
    objects: np.ndarray  #: ``(m,) int64`` what is asked for, index into :data:`OBJECTS`


def present_objects(scenes: Scenes) -> np.ndarray:
    """``(n, 30) bool``: which objects (colour and shape together) each scene has."""
    out = np.zeros((scenes.n, len(OBJECTS)), bool)
    for j in range(2):
        on = np.flatnonzero(scenes.objects[:, j, _SHAPE] >= 0)
        o = scenes.objects[on, j].astype(int)
        out[on, o[:, _COLOUR] * len(SHAPES) + o[:, _SHAPE]] = True
    return out


def near_misses(present: np.ndarray) -> np.ndarray:
    """``(n, 30) bool``: absent objects that share colour or shape with a present one."""
    grid = present.reshape(-1, len(COLOURS), len(SHAPES))
    return (grid.any(2)[:, :, None] | grid.any(1)[:, None]).reshape(present.shape) & ~present


def draw(candidates: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """``(n,)`` one of the candidates ``(n, k) bool`` of every row, each equally likely."""
    return np.where(candidates, rng.random(candidates.shape, dtype=np.float32) + 1, 0).argmax(1)


def object_questions(
    scenes: Scenes | np.ndarray, seed: int, negatives: Negatives = "random", per_image: int = 1
) -> Questions:
    """POPE's questions: of every image, equally often an object that is there and one that is not.

    Args:
        scenes: The scenes, or their :func:`present_objects`.
        seed: Everything follows from it.
        negatives: Absent objects are ``random``; ``adversarial``: near misses, which share colour or shape with an
            object that is there; ``popular``: the one that most scenes have, of those absent here.
        per_image: Pairs of questions for each image.
    """
    rng = np.random.default_rng([seed, 30])
    present = scenes if isinstance(scenes, np.ndarray) else present_objects(scenes)
    rows, objects, answers = [], [], []
    popularity = present.mean(0)
    for _ in range(per_image):
        yes = draw(present, rng)
        if negatives == "popular":
            no = np.where(present, -1, popularity + 1e-6 * rng.random(present.shape)).argmax(1)
        else:
            no = draw(near_misses(present) if negatives == "adversarial" else ~present, rng)
        rows += [np.arange(len(present))] * 2
        objects += [yes, no]
        answers += [np.ones(len(present), bool), np.zeros(len(present), bool)]
    row, thing, answer = (np.concatenate(x) for x in (rows, objects, answers))
    order = np.argsort(row, kind="stable")
    return Questions(row[order], [ask(OBJECTS[i]) for i in thing[order]], answer[order], thing[order])


class Lessons(NamedTuple):
    """What the tiny LLaVA learns from, in memory."""

    images: np.ndarray  #: ``(N, S, S, 3) uint8``
    captions: list[list[str]]  #: Answers to :data:`DESCRIBE` of each image (may be none)
    #: ``(N, 30) bool`` objects, about which questions are made up; a row without any has no such questions
    present: np.ndarray
    dialogues: list[tuple[str, str] | None]  #: The own question and answer of each image, or None

    def texts(self) -> list[str]:
        """Everything that is said in them."""
        own = [t for d in self.dialogues if d for t in d]
        return [c for several in self.captions for c in several] + own


def world_lessons(data: WorldData) -> Lessons:
    """Full captions and made-up questions of generated scenes."""
    return Lessons(data.images, [[c] for c in data.full], present_objects(data.scenes), [None] * len(data.full))


def shard_lessons(shards: str | Sequence[str], image_size: int = 32, fault_limit: float = FAULT_LIMIT) -> Lessons:
    """Lessons from shards.

    A sample whose json has ``question`` and ``answer`` teaches that; else one with ``objects`` (the generated world)
    teaches its caption and made-up questions; else the caption.

    Raises:
        InputError: No shard matches, none is readable, or too many samples are not.
    """
    faults, images, captions, present, dialogues = FaultLog(), [], [], [], []
    for path in expand(list(shards) if not isinstance(shards, str) else shards):
        for s in read_shard(path, faults, need=("image",)):
            image = s.image if s.image.size == (image_size, image_size) else s.image.resize((image_size, image_size))
            question, answer = s.meta.get("question"), s.meta.get("answer")
            own = (str(question), str(answer)) if question and answer is not None else None
            if own is None and not s.caption:
                faults.add("missing_caption", s.shard, s.key, "nor question and answer")
                continue
            found = np.zeros(len(OBJECTS), bool)
            for o in [] if own else s.meta.get("objects") or []:
                if isinstance(o, dict) and f"{o.get('colour')} {o.get('shape')}" in OBJECTS:
                    found[OBJECTS.index(f"{o['colour']} {o['shape']}")] = True
            images.append(np.asarray(image.convert("RGB")))
            captions.append([] if own else [s.caption])
            present.append(found)
            dialogues.append(own)
        faults.check(fault_limit)
    faults.check(fault_limit, final=True)
    if not images:
        raise InputError(f"{shards} holds no readable sample")
    return Lessons(np.stack(images), captions, np.stack(present), dialogues)


def pil_images(images: np.ndarray) -> list[Image.Image]:
    """``n`` PIL images of ``(n, S, S, 3) uint8``."""
    return [Image.fromarray(x) for x in images]
