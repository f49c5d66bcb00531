"""Scenes to 32 x 32 RGB images, in numpy, a block at a time."""

from __future__ import annotations

import numpy as np

from mmsae.world.generator.scene import SHAPES, TEXTURES, Scenes

SIZE = 32
#: RGB of COLOURS and of BACKGROUNDS.
PALETTE = np.array(
    [[220, 40, 40], [40, 170, 60], [50, 80, 225], [235, 215, 50], [150, 50, 185], [60, 205, 220]], np.float32
)
GROUND = np.array([[35, 35, 35], [128, 128, 128], [222, 222, 222]], np.float32)
NOISE = 4.0  # standard deviation, in grey levels
DIM = 0.45  # brightness of the dark stripes
_PERIOD = 4  # pixels from stripe to stripe
_BLOCK = 256  # images at a time: the masks then stay in cache


def _inside(shape: str, dx: np.ndarray, dy: np.ndarray, r: np.ndarray) -> np.ndarray:
    """``(m, P, P) bool`` from offsets ``dx (m, 1, P)``, ``dy (m, P, 1)`` to the centre and radii ``r (m, 1, 1)``."""
    if shape == "circle":
        return dx * dx + dy * dy < r * r
    if shape == "ring":
        d2 = dx * dx + dy * dy
        return (d2 < r * r) & (d2 > (0.55 * r) ** 2)
    if shape == "square":
        half = 0.86 * r
        return (np.abs(dx) < half) & (np.abs(dy) < half)
    if shape == "cross":
        arm, ax, ay = 0.3 * r, np.abs(dx), np.abs(dy)
        return ((ax < arm) & (ay < r)) | ((ay < arm) & (ax < r))
    half = (dy + r) * 0.55  # triangle: tip up at -r, base at .8 r
    return (np.abs(dx) < half) & (dy < 0.8 * r)


def _shrink(x: np.ndarray) -> np.ndarray:
    """Mean over 2 x 2 cells of ``(m, 2S, 2S)``."""
    x = x[:, 0::2] + x[:, 1::2]
    return (x[:, :, 0::2] + x[:, :, 1::2]) * 0.25


def render(scenes: Scenes, seed: int) -> np.ndarray:
    """``(n, 32, 32, 3) uint8`` images: 2 x supersampled shapes, Gaussian pixel noise drawn from ``seed``."""
    rng = np.random.default_rng([seed, 2])
    out = np.empty((scenes.n, SIZE, SIZE, 3), np.uint8)
    for start in range(0, scenes.n, _BLOCK):
        block = slice(start, min(start + _BLOCK, scenes.n))
        image = _paint(scenes.rows(block))
        image += NOISE * rng.standard_normal(image.shape, dtype=np.float32)
        out[block] = np.clip(np.rint(image), 0, 255)
    return out


def _paint(scenes: Scenes) -> np.ndarray:
    """``(m, 32, 32, 3) float32`` images without noise."""
    at = ((np.arange(2 * SIZE) + 0.5) / 2).astype(np.float32)
    image = np.repeat(GROUND[scenes.background][:, None, None], SIZE, 1).repeat(SIZE, 2)
    for j in range(2):
        for s, shape in enumerate(SHAPES):
            rows = np.flatnonzero(scenes.objects[:, j, 0] == s)
            if not len(rows):
                continue
            dx = at[None, None, :] - scenes.centre[rows, j, 0, None, None]
            dy = at[None, :, None] - scenes.centre[rows, j, 1, None, None]
            mask = _inside(shape, dx, dy, scenes.radius[rows, j, None, None]).astype(np.float32)
            striped = scenes.objects[rows, j, 3] == TEXTURES.index("striped")
            dark = striped[:, None, None] & (np.floor(dy / (_PERIOD / 2)) % 2 == 1)
            light = np.where(dark, np.float32(DIM), np.float32(1))  # (m, 2S, 1): stripes are horizontal
            cover, paint = _shrink(mask)[..., None], _shrink(mask * light)[..., None]
            image[rows] = image[rows] * (1 - cover) + PALETTE[scenes.objects[rows, j, 1]][:, None, None] * paint
    return image
