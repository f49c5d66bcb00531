"""Whether generated images show what their prompts say, by scorers that never saw the generator."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmsae import SAE
from mmsae.metrics.choice import warn_at_edge
from mmsae.steering import Edit, FeatureStats, Intervention, attach
from mmsae.types import TEXT, InputError
from mmsae.world.generator.captions import PLACES
from mmsae.world.generator.scene import BACKGROUNDS, COLOURS, POSITIONS, SHAPES, SIZES
from mmsae.world.measure.probe import WorldProbe, pixel_background, pixel_colour, to_uint8

#: Prompts to images ``(n, 3, H, W)`` in [0, 1].
Generate = Callable[[list[str]], Tensor]


class ObjectPrompts(NamedTuple):
    """Prompts for one object, and what they ask for."""

    texts: list[str]  #: The ``n`` prompts
    wanted: dict[str, np.ndarray]  #: ``{attribute: (n,) value ids}``

    def rows(self, which: np.ndarray | slice) -> ObjectPrompts:
        """Some of them."""
        index = np.arange(len(self.texts))[which]
        return ObjectPrompts([self.texts[i] for i in index], {a: v[index] for a, v in self.wanted.items()})

    def recoloured(self, colour: str) -> ObjectPrompts:
        """The same prompts with another colour."""
        value = np.full(len(self.texts), COLOURS.index(colour))
        return prompts_for(self.wanted | {"colour": value})


def prompts_for(wanted: dict[str, np.ndarray]) -> ObjectPrompts:
    """``a large red circle in the center on a dark background``, of given values."""
    rows = zip(*(wanted[a].tolist() for a in ("size", "colour", "shape", "position", "background")), strict=True)
    texts = [f"a {SIZES[z]} {COLOURS[c]} {SHAPES[s]} {PLACES[p]} on a {BACKGROUNDS[b]} background"
             for z, c, s, p, b in rows]  # fmt: skip
    return ObjectPrompts(texts, wanted)


def draw_prompts(n: int, seed: int, colour: str | None = None, *, vary: bool = False) -> ObjectPrompts:
    """Prompts in random order, no combination twice before all have come; of all six colours, or of one.

    With ``vary`` sizes and places differ too (900 prompts, 150 of one colour); else all objects are large and in the
    center (90 prompts, 15 of one colour).
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


def score_images(images: np.ndarray, wanted: dict[str, np.ndarray], probe: WorldProbe | None = None) -> dict:
    """Share of images ``(n, H, W, 3) uint8`` that show what was wanted, ``{attribute: (n,) value ids}``.

    Returns:
        ``{"colour", "background"}`` by pixels, and ``"probe": {attribute: share}`` where a probe is given.
    """
    out = {
        "colour": float((pixel_colour(images) == wanted["colour"]).mean()),
        "background": float((pixel_background(images) == wanted["background"]).mean()),
    }
    if probe is not None:
        said = probe.predict(images)
        out["probe"] = {a: float((said[a] == v).mean()) for a, v in wanted.items()}
    return out


def evaluate_diffusion(generate: Generate, prompts: ObjectPrompts, probe: WorldProbe | None = None) -> dict:
    """:func:`score_images` of what ``generate`` makes of the prompts, and ``n``."""
    images = to_uint8(generate(prompts.texts))
    return {"n": len(images), **score_images(images, prompts.wanted, probe)}


SITE = "text_encoder.final_layer_norm:out[mask]"
EDITED = "text_encoder.final_layer_norm:out[all]"  # the denoiser attends to padding too, and that knows the prompt
KS, STRENGTHS = (2, 4, 8, 16), (1.0, 1.5, 2.0, 3.0)


class Contrast(NamedTuple):
    """What the latents do on prompts that differ in the colour alone, token by token."""

    source: Tensor  #: ``(d_sae,)`` mean code of the prompts as they are, over all tokens where the two differ
    target: Tensor  #: ``(d_sae,)`` of their recoloured twins


@torch.no_grad()
def colour_contrast(host: Any, sae: SAE, prompts: ObjectPrompts, colour: str) -> Contrast:
    """Mean codes of prompts of one colour and of the same with another, on the tokens that know the colour."""
    x = [
        next(host.stream(p.texts, SITE, batch_size=len(p.texts))).x[TEXT] for p in (prompts, prompts.recoloured(colour))
    ]
    if len(x[0]) != len(x[1]):
        raise InputError(f"the prompts and those with {colour} have {len(x[0])} and {len(x[1])} tokens")
    differ = ~torch.isclose(x[0], x[1], atol=1e-5).all(1)  # what stands before the colour is the same in both
    mean = [sae.encode(rows[differ], TEXT).pool(torch.zeros(int(differ.sum()), dtype=torch.long), 1)[0] for rows in x]
    return Contrast(*mean)


def substitution(contrast: Contrast, k: int, strength: float = 1.0, stats: FeatureStats | None = None) -> Intervention:
    """Take the source's latents away and put the target's in, on the tokens where the source's fire.

    ``z_i' = -strength z_i`` for the ``k`` latents that the source has more of, ``z_i' = z_i + strength m_i`` for the
    ``k`` that the target has more of, ``m_i`` their mean there; written back as a difference (what the SAE does not
    explain stays).

    Args:
        contrast: Contrast of the two words, on prompts other than those that are reported.
        k: Latents of either side.
        strength: Strength of both sides.
        stats: Statistics of the latents; random controls draw from those that are live there.
    """
    gain = contrast.target - contrast.source
    source, target = ((sign * gain).topk(min(k, int((sign * gain > 0).sum()))).indices for sign in (-1, 1))
    edit = Edit.scale(source, -1.0) + Edit.add(target, contrast.target[target])
    fires = [0.0 if i in set(source.tolist()) else torch.inf for i in edit.ids]
    return Intervention(edit, "raw", stats, strength=strength, tokens="all", active=fires)


class Outcome(NamedTuple):
    """Shares of images."""

    source: float  #: Show the source colour, by pixels
    target: float  #: Show the target colour, by pixels
    background: float  #: Show the background of the prompt, by pixels
    size: float  #: Show the size of the prompt, by the classifier


def outcome(drawn: Tensor, prompts: ObjectPrompts, target: int, probe: WorldProbe) -> Outcome:
    """What images ``(n, 3, H, W)`` in [0, 1] of prompts show when ``target`` (an index into COLOURS) was wanted."""
    images = to_uint8(drawn)
    said, ground = pixel_colour(images), pixel_background(images)
    right = [said == prompts.wanted["colour"], said == target, ground == prompts.wanted["background"]]
    right.append(probe.predict(images)["size"] == prompts.wanted["size"])
    return Outcome(*(float(np.mean(r)) for r in right))


def draw_with(host: Any, sae: SAE, way: Any, texts: Sequence[str], **options: Any) -> tuple[Tensor, float]:
    """Images of prompts ``(n, 3, H, W)``, and the mean ``|dx| / |x|`` of the tokens that were changed.

    ``way`` is an intervention, a control, or None; each prompt has its own noise, the same for every way. ``options``
    are those of ``host.generate``.
    """
    options = {"seed": range(len(texts)), "batch_size": 48} | options
    if way is None:
        return host.generate(texts, **options), 0.0
    with warnings.catch_warnings(), attach(host, {EDITED: (sae, way)}) as log:
        warnings.simplefilter("ignore")  # of large changes: their size is returned
        return host.generate(texts, **options), log.relative


def tune(
    host: Any,
    sae: SAE,
    contrast: Contrast,
    prompts: ObjectPrompts,
    target: int,
    probe: WorldProbe,
    ks: Iterable[int] = KS,
    strengths: Iterable[float] = STRENGTHS,
    stats: FeatureStats | None = None,
    **options: Any,
) -> tuple[int, float, list[dict[str, float]]]:
    """``k`` and strength that are best on tuning prompts: target colour, background and size are right.

    Size is asked because strong edits blow small objects up, which pixels of colour and background do not show.
    ``target`` is an index into COLOURS, ``options`` are those of ``host.generate``; else see :func:`substitution`.

    Returns:
        ``k``, strength (the gentlest among equals), and all that was tried.

    Warns:
        UserWarning: The best k or strength is an end of what was tried.
    """
    tried = []
    for k, strength in product(ks, strengths):
        images, _ = draw_with(host, sae, substitution(contrast, k, strength, stats), prompts.texts, **options)
        tried.append({"k": k, "strength": strength, **outcome(images, prompts, target, probe)._asdict()})
    best = max(tried, key=lambda t: (t["target"] + t["background"] + t["size"], -t["strength"], -t["k"]))
    warn_at_edge(tried, best, ("k", "strength"))
    return best["k"], best["strength"], tried
