"""A tiny host, SAEs on two of its sites and labelled shards, made on the spot."""

import io

import numpy as np
import torch
from PIL import Image

from mmsae.hosts import load_host
from mmsae.sae import SAE, Normaliser, TopK
from mmsae.shards import ShardWriter

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220)}


def save_host(folder):
    from tests.helpers.encoders import MODELS, save_local

    return save_local(folder, MODELS["vit"])


def png(array):
    out = io.BytesIO()
    Image.fromarray(array).save(out, "png")
    return out.getvalue()


def write_colours(folder, n, seed, prefix="c", colours=COLOURS, noise=25, per_shard=60, **meta):
    """Noisy pictures of one colour each, with ``cls`` and json ``class``."""
    rng = np.random.default_rng(seed)
    with ShardWriter(folder, prefix, per_shard=per_shard) as w:
        for i in range(n):
            c = i % len(colours)
            name = list(colours)[c]
            picture = np.asarray(colours[name]) + noise * rng.standard_normal((32, 32, 3))
            fields = {"png": png(picture.clip(0, 255).astype(np.uint8)), "txt": f"a {name} square", "cls": str(c)}
            w.write(f"{prefix}-{i:04d}", {**fields, "json": {"class": name, **meta}})
    return str(folder)


def write_noise(folder, n, seed=9, prefix="n"):
    """Uniform noise, without labels."""
    rng = np.random.default_rng(seed)
    with ShardWriter(folder, prefix, per_shard=100) as w:
        for i in range(n):
            picture = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            w.write(f"{prefix}-{i:04d}", {"png": png(picture), "txt": "noise"})
    return str(folder)


def save_sae(folder, host, site="image.pooled", modalities=("image",), d_sae=64, k=8, seed=0):
    """An untrained SAE on a site of a host (its dictionary is tied, so it reconstructs a little)."""
    loaded = load_host(host)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sites = {m: loaded.site(site.replace("image", m)) for m in modalities}
        normaliser = Normaliser(unit_in=True, centre=True, unit_out=True)
        sae = SAE({m: s.width for m, s in sites.items()}, d_sae, modalities=modalities, normaliser=normaliser,
                  selector=TopK(k))  # fmt: skip
    sae.fit_normaliser({m: torch.randn(500, s.width) for m, s in sites.items()})
    sae.sites = sites
    sae.save_pretrained(folder)
    return str(folder)
