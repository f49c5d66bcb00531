"""Scenes of shapes as patch codes, whose areas are known."""

import numpy as np

from mmsae.interpret.areas.patches import PatchCodes

D = 32
CELLS = np.arange(32 * 32).reshape(32, 32)
VIEWS = {  # of patches, and which cell each upsampled cell comes from
    "flip": (lambda z: z[:, ::-1], CELLS[:, ::-1]),
    "turn": (lambda z: np.rot90(z), np.rot90(CELLS)),
    "crop": (lambda z: z[:8, :8].repeat(2, 0).repeat(2, 1), CELLS[:16, :16].repeat(2, 0).repeat(2, 1)),
}


def scene(shapes, rows=16, cols=16, noise=0.0, seed=0):
    """Dense codes ``(rows, cols, D)`` and masks ``(n, rows, cols)`` of ``(latents, top, left, height, width)``."""
    z, masks = np.zeros((rows, cols, D), np.float32), np.zeros((len(shapes), rows, cols), bool)
    for i, (latents, top, left, height, width) in enumerate(shapes):
        masks[i, top : top + height, left : left + width] = True
        for k, j in enumerate(np.atleast_1d(latents)):
            z[top : top + height, left : left + width, j] = 1 + 0.1 * k
    if noise:
        rng = np.random.default_rng(seed)
        z *= 1 + noise * rng.uniform(-1, 1, z.shape)
    return z, masks


def drawn(n, seed, rows=16, cols=16):
    """``n`` shapes of different latents and of 2 x 2 to 4 x 4 patches that do not touch."""
    rng = np.random.default_rng(seed)
    cells = rng.permutation(9)[:n]
    latents = rng.permutation(D - 2)[:n]
    out = []
    for j, cell in zip(latents, cells, strict=True):
        r, c = divmod(int(cell), 3)
        h, w = rng.integers(2, 5, 2)
        out.append((int(j), 5 * r + int(rng.integers(0, 5 - h)), 5 * c + int(rng.integers(0, 5 - w)), h, w))
    return [s for s in out if s[1] + s[3] <= rows and s[2] + s[4] <= cols]


def codes(z):
    """Dense codes as :class:`PatchCodes`."""
    return PatchCodes.of_dense(z)
