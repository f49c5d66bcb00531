"""Out-of-distribution sets for the generated world, as shards: digits, noise, and scenes under a faint checkerboard."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mmsae.world.generator.data import generate
from mmsae.world.generator.scene import COLOURS, OBJECT_ATTRIBUTES, SHAPES
from mmsae.world.generator.shards import write_samples

CHECK, STEP = 4, 30  # pixels of a field, and how much lighter or darker it is
NEAR, FAR = ("checker",), ("digits", "noise")
PER_SHARD = 500


def write_images(folder: str | Path, prefix: str, images: np.ndarray, classes: Sequence[str]) -> str:
    """Shards of ``images (n, H, W, 3) uint8`` with a caption and json ``class``; returns the folder."""
    texts, metas = [f"a {c}" for c in classes], [{"class": c} for c in classes]
    write_samples(folder, prefix, images, texts, metas, per_shard=PER_SHARD)
    return str(folder)


def lone_objects(n: int, seed: int) -> tuple[np.ndarray, list[str]]:
    """Scenes of one object: ``(m, 32, 32, 3) uint8`` with m about .6 n, and the class ``colour shape`` of each."""
    data = generate(n, seed, siblings=False)
    alone = np.flatnonzero(~data.scenes.two)
    at = list(OBJECT_ATTRIBUTES)
    shape, colour = (data.scenes.objects[alone, 0, at.index(a)] for a in ("shape", "colour"))
    return data.images[alone], [f"{COLOURS[c]} {SHAPES[s]}" for s, c in zip(shape, colour, strict=True)]


def digits(n: int) -> tuple[np.ndarray, list[str]]:
    """The first ``n`` of scikit-learn's handwritten digits (8 x 8, the UCI set) as grey images of 32 x 32."""
    from sklearn.datasets import load_digits

    data = load_digits()
    grey = (data.images[:n] * (255 / 16)).astype(np.uint8).repeat(4, 1).repeat(4, 2)
    return np.repeat(grey[..., None], 3, 3), [f"digit {d}" for d in data.target[:n]]


def checker(images: np.ndarray) -> np.ndarray:
    """Images whose fields of 4 x 4 pixels are in turn a little lighter and darker: near-OOD."""
    at = np.arange(images.shape[1]) // CHECK
    sign = np.where((at[:, None] + at[None]) % 2, STEP, -STEP)[None, :, :, None]
    return (images.astype(np.int16) + sign).clip(0, 255).astype(np.uint8)


def write_ood_sets(out: str | Path, n: int, seed: int) -> dict[str, str]:
    """Write the ID set ``id`` (of n scenes those of one object, about .6 n) and the OOD sets, of half as many images.

    ``seed`` is of scenes and noise; not one that a host was trained on. Returns ``{set: folder in out}``.
    """
    images, names = lone_objects(n, seed)
    other, other_names = lone_objects(n // 2, seed + 1)
    m = len(images) // 2
    noise = np.random.default_rng([seed, 9]).integers(0, 256, (m, *images.shape[1:]), dtype=np.uint8)
    sets = {
        "id": (images, names),
        "digits": digits(m),
        "noise": (noise, ["noise"] * len(noise)),
        "checker": (checker(other), [f"checkered {name}" for name in other_names]),
    }
    return {name: write_images(Path(out) / name, name, *some) for name, some in sets.items()}
