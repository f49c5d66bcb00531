"""A tiny host, an SAE on it, and shards of the generated world in which some captions are swapped."""

import io
import json
from pathlib import Path

import torch
from PIL import Image

from mmsae import SAE
from mmsae.filtering.command import filter_command
from mmsae.hosts import load_host
from mmsae.options import call
from mmsae.sae import TopK
from mmsae.shards import ShardWriter
from mmsae.world.generator.captions import swap
from mmsae.world.generator.data import generate
from tests.helpers.encoders import MODELS, save_local

QUIET = {"workers": 0, "progress": False, "batch_size": 8, "per_shard": 12, "device": "cpu"}


def filter_shards(sae, shards, out, report=False, **options):
    """``mmsae filter``, without its page."""
    return call(filter_command, sae=sae, shards=shards, out=out, report=report, **options)


def make_host(root, name="clip", seed=0, d_sae=40, k=6):
    """Folders of a host and of an SAE on it, both with random weights."""
    host = load_host(save_local(root / name, MODELS["vit"], seed))
    torch.manual_seed(seed)
    sae = SAE(16, d_sae, selector=TopK(k))
    sae.sites = host.default_sites()
    return str(sae.save_pretrained(root / f"{name}-sae"))


def make_shards(folder, n=80, per_shard=16, share=0.3, keys=None):
    """Shards of the world; returns the uids of the samples with a wrong caption."""
    data = generate(n, 3)
    captions, wrong = swap(data.full, 0, share)
    damaged = []
    with ShardWriter(folder, "w", per_shard=per_shard) as w:
        for i in range(n):
            png = io.BytesIO()
            Image.fromarray(data.images[i]).save(png, "PNG")
            meta = {**data.meta(i), "uid": f"{i * 7919:032x}"}
            key = f"{i:05d}" if keys is None else keys(i)
            w.write(key, {"png": png.getvalue(), "txt": captions[i], "json": meta, "cls": i})
            if wrong[i]:
                damaged.append(meta["uid"])
    return damaged


def tree(folder):
    """``{path: bytes}`` of everything in a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def results(folder):
    return json.loads((Path(folder) / "results.json").read_text())
