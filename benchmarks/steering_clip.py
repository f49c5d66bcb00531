"""VS2 on the world's CLIP, for ``benchmarks/steering.py``."""

import numpy as np
import torch
from PIL import Image

from mmsae import SAE, tiny_hosts
from mmsae.sae.control import random_control
from mmsae.steering.vs2 import vs2, zero_shot_steered
from mmsae.world.data import generate
from mmsae.world.scene import COLOURS, SHAPES


def clip_vs2(b):
    """VS2 on the world's CLIP: 30 classes of colour and shape; gamma is chosen on training renders."""
    sae = SAE.from_pretrained(tiny_hosts.sae("paired_topk"))
    classes = b.clip.encode_text(b.clip.tokenize([f"a {c} {s}" for c in COLOURS for s in SHAPES]))
    transform, out = b.clip.transform(), {}

    def accuracy(model, gamma, guard, seed):
        data = generate(1500, seed, siblings=False)
        rows = np.flatnonzero(~data.scenes.two)
        images = torch.stack([transform(Image.fromarray(data.images[i])) for i in rows])
        shape, col = (torch.from_numpy(data.scenes.objects[rows, 0, i]).long() for i in (0, 1))
        found = zero_shot_steered(b.clip, images.split(500), classes, model, vs2(gamma, guard), "image.embed")
        return [*found.accuracy(col * len(SHAPES) + shape), found.share, found.relative]

    tuned = {f"{g}, guard {q}": accuracy(sae, g, q, 101)[1] for g in (0.5, 1.5, 2.0, 4.0) for q in (None, 0.5)}
    best = max(tuned, key=tuned.get)
    gamma, guard = best.split(", guard ")
    args = float(gamma), None if guard == "None" else float(guard)
    for name, model in (("sae", sae), ("random sae", random_control(sae))):
        clean, steered, share, relative = np.mean([accuracy(model, *args, s) for s in (201, 202, 203)], 0)
        out[name] = {"clean": clean, "steered": steered, "share": share, "|dx|/|x|": relative}
    return out | {"setting": best, "tuning": tuned}
