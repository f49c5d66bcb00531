"""Scorers of generated images for sweeps of steering: arithmetic on pixels, and a classifier of its own.

``mmsae steer --scorers "blue=mmsae.world.measure.scorers:colour(blue)"
"ground=mmsae.world.measure.scorers:asked(background)"``
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mmsae.steering.measure.scorers import Scorer
from mmsae.types import InputError
from mmsae.world.generator.captions import mentions
from mmsae.world.generator.scene import BACKGROUNDS, COLOURS, CONCEPT_GROUPS, GROUP_COLUMNS
from mmsae.world.measure.probe import WorldProbe, pixel_background, pixel_colour, to_uint8

_PIXELS = {"colour": pixel_colour, "background": pixel_background}


def _hits(found: np.ndarray, wanted: np.ndarray | int) -> Tensor:
    return torch.from_numpy((found == wanted).astype(np.float64))


def colour(name: str) -> Scorer:
    """1 where the pixels of the object have a colour."""
    wanted = _index("colour", name)
    return lambda images, prompts: _hits(pixel_colour(to_uint8(images)), wanted)


def background(name: str) -> Scorer:
    """1 where the pixels of the frame are of a background."""
    wanted = _index("background", name)
    return lambda images, prompts: _hits(pixel_background(to_uint8(images)), wanted)


def wanted(group: str, prompts: Sequence[str]) -> np.ndarray:
    """``(n,)`` value of a group that each prompt asks for, -2 where it asks for none."""
    truth = mentions(list(prompts))[:, list(GROUP_COLUMNS[group])]
    return np.where(truth.any(1), truth.argmax(1), -2)


def asked(group: str) -> Scorer:
    """1 where the pixels show the colour, or the background, that the prompt asks for."""
    if group not in _PIXELS:
        raise InputError(f"pixels tell {', '.join(_PIXELS)}, not {group!r}")
    return lambda images, prompts: _hits(_PIXELS[group](to_uint8(images)), wanted(group, prompts))


def probed(file: str, group: str, value: str | None = None) -> Scorer:
    """1 where the :class:`.WorldProbe` in a file sees a value of a group (default: the prompt's)."""
    probe, fixed = WorldProbe.load(file), None if value is None else _index(group, value)

    def scorer(images: Tensor, prompts: Sequence[str]) -> Tensor:
        return _hits(probe.predict(to_uint8(images))[group], wanted(group, prompts) if fixed is None else fixed)

    return scorer


def _index(group: str, value: str) -> int:
    names = {"colour": COLOURS, "background": BACKGROUNDS}.get(group, CONCEPT_GROUPS.get(group, ()))
    if value not in names:
        raise InputError(f"{group} {value!r} is not one of {', '.join(names)}")
    return list(names).index(value)
