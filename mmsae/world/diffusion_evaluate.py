"""Whether generated pictures show what their prompts say, by scorers that never saw the generator."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import NamedTuple

import numpy as np
from torch import Tensor

from mmsae.world.captions import PLACES
from mmsae.world.probe import WorldProbe, pixel_background, pixel_colour, to_uint8
from mmsae.world.scene import BACKGROUNDS, COLOURS, POSITIONS, SHAPES, SIZES

#: Prompts to pictures ``(n, 3, H, W)`` in [0, 1].
Generate = Callable[[list[str]], Tensor]


class Prompts(NamedTuple):
    """Prompts for one object, and what they ask for.

    Attributes:
        texts: The ``n`` prompts.
        wanted: ``{attribute: (n,) value ids}``.
    """

    texts: list[str]
    wanted: dict[str, np.ndarray]

    def rows(self, which: np.ndarray | slice) -> Prompts:
        """Some of them."""
        index = np.arange(len(self.texts))[which]
        return Prompts([self.texts[i] for i in index], {a: v[index] for a, v in self.wanted.items()})

    def recoloured(self, colour: str) -> Prompts:
        """The same prompts with another colour."""
        value = np.full(len(self.texts), COLOURS.index(colour))
        return prompts_for(self.wanted | {"colour": value})


def prompts_for(wanted: dict[str, np.ndarray]) -> Prompts:
    """``a large red circle in the center on a dark background``, of given values."""
    rows = zip(*(wanted[a].tolist() for a in ("size", "colour", "shape", "position", "background")), strict=True)
    texts = [f"a {SIZES[z]} {COLOURS[c]} {SHAPES[s]} {PLACES[p]} on a {BACKGROUNDS[b]} background"
             for z, c, s, p, b in rows]  # fmt: skip
    return Prompts(texts, wanted)


def draw_prompts(n: int, seed: int, colour: str | None = None, *, vary: bool = False) -> Prompts:
    """Prompts in random order, no combination twice before all have come.

    Args:
        n: How many.
        seed: Of the order.
        colour: The only colour; else all six.
        vary: Sizes and places too (900 prompts, 150 of one colour); else all objects are large and in the center (90
            prompts, 15 of one colour).
    """
    rng = np.random.default_rng([seed, 50])
    values = {
        "colour": range(len(COLOURS)) if colour is None else [COLOURS.index(colour)],
        "shape": range(len(SHAPES)),
        "background": range(len(BACKGROUNDS)),
        "size": range(len(SIZES)) if vary else [SIZES.index("large")],
        "position": range(len(POSITIONS)) if vary else [POSITIONS.index("center")],
    }
    grid = np.array(list(product(*values.values())))
    order = np.concatenate([rng.permutation(len(grid)) for _ in range(-(-n // len(grid)))])[:n]
    return prompts_for(dict(zip(values, grid[order].T, strict=True)))


def score_pictures(images: np.ndarray, wanted: dict[str, np.ndarray], probe: WorldProbe | None = None) -> dict:
    """Share of pictures that show what was wanted.

    Args:
        images: ``(n, H, W, 3) uint8``.
        wanted: ``{attribute: (n,) value ids}``.
        probe: Asked for all attributes too, where given.

    Returns:
        ``{"colour", "background"}`` by pixels, and ``"probe": {attribute: share}``.
    """
    out = {
        "colour": float((pixel_colour(images) == wanted["colour"]).mean()),
        "background": float((pixel_background(images) == wanted["background"]).mean()),
    }
    if probe is not None:
        said = probe.predict(images)
        out["probe"] = {a: float((said[a] == v).mean()) for a, v in wanted.items()}
    return out


def evaluate_diffusion(generate: Generate, prompts: Prompts, probe: WorldProbe | None = None) -> dict:
    """:func:`score_pictures` of what ``generate`` makes of the prompts, and ``n``."""
    images = to_uint8(generate(prompts.texts))
    return {"n": len(images), **score_pictures(images, prompts.wanted, probe)}
