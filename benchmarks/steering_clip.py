"""VS2 on the world's CLIP, for ``benchmarks/steering.py``."""

from itertools import product

import numpy as np
import torch
from PIL import Image

from mmsae import SAE
from mmsae.demo import tiny_hosts
from mmsae.sae.random_control import random_control
from mmsae.steering.methods.zero_shot_vs2 import vs2, zero_shot_steered
from mmsae.world.generator.data import generate
from mmsae.world.generator.scene import COLOURS, SHAPES

GRID = tuple(product((0.5, 1.25, 1.5, 2.0, 4.0), (None, 0.25, 0.1)))  # gamma, guard


def clip_vs2(b):
    """Zero-shot accuracy on 30 classes of colour and shape; gamma and guard are chosen on other renders."""
    sae = SAE.from_pretrained(tiny_hosts.sae("paired_topk"))
    classes = b.clip.encode_text(b.clip.tokenize([f"a {c} {s}" for c in COLOURS for s in SHAPES]))

    def accuracy(model, gamma, guard, images, labels):
        found = zero_shot_steered(b.clip, images.split(500), classes, model, vs2(gamma, guard), "image.embed")
        return [*found.accuracy(labels), found.share, found.relative]

    out = {}
    for noise in (0.0, 0.05, 0.1):
        tuning = renders(b, noise, 101)
        tuned = {s: accuracy(sae, *s, *tuning)[1] for s in GRID}
        best = max(tuned, key=tuned.get)
        new = [renders(b, noise, s) for s in (201, 202, 203)]
        out[f"noise {noise}"] = {"gamma": best[0], "guard": best[1], "tuning": {str(k): v for k, v in tuned.items()}}
        for name, model in (("sae", sae), ("random sae", random_control(sae))):
            rows = [accuracy(model, *best, *data) for data in new]
            clean, steered, share, relative = np.mean(rows, 0)
            gains = [r[1] - r[0] for r in rows]
            out[f"noise {noise}"][name] = {
                "clean": clean, "steered": steered, "gains": gains, "share": share, "|dx|/|x|": relative,
            }  # fmt: skip
    return out


def renders(b, noise, seed):
    """Pictures of one object with Gaussian noise (in units of the full range), and their classes."""
    data = generate(1500, seed, siblings=False)
    rows = np.flatnonzero(~data.scenes.two)
    rng = np.random.default_rng([seed, 7])
    pixels = data.images[rows] + 255 * noise * rng.standard_normal((len(rows), 32, 32, 3), dtype=np.float32)
    pictures = [Image.fromarray(p) for p in pixels.round().clip(0, 255).astype(np.uint8)]
    shape, colour = (torch.from_numpy(data.scenes.objects[rows, 0, i]).long() for i in (0, 1))
    return torch.stack(list(map(b.clip.transform(), pictures))), colour * len(SHAPES) + shape
