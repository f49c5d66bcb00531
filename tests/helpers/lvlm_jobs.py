"""A tiny random LLaVA, an SAE on its tokens, and shards for it."""

import io
import json
import tarfile

import torch

from mmsae.hosts import load_host
from mmsae.sae import SAE, AffineEncoder, TopK
from tests.helpers.lvlm import llava, picture, sample

QUESTIONS = [
    "is there a red circle ?",
    "is there a blue square left of a green circle ?",
    "what is left of the picture ?",
    "there is a green square .",
]
__all__ = ["QUESTIONS", "make_host", "make_sae", "picture", "sample", "shard"]


def make_host(folder):
    return load_host(llava(folder / "llava"))


def make_sae(host, d_sae=48, k=6, site="layers.1:out", seed=0):
    """An SAE with the host's sites, its normaliser fitted on nothing in particular."""
    torch.manual_seed(seed)
    sae = SAE(host.hidden_size, d_sae, encoder=AffineEncoder(), selector=TopK(k)).eval()
    sae.fit_normaliser({m: torch.randn(64, host.hidden_size) for m in sae.modalities})
    sae.sites = host.sites(site)
    return sae


def shard(path, n, start=0, **meta):
    """A tar of ``n`` pictures with a question each."""
    with tarfile.open(path, "w") as archive:
        for i in range(start, start + n):
            data = io.BytesIO()
            picture(i).save(data, "PNG")
            question = QUESTIONS[i % len(QUESTIONS)]
            fields = {"png": data.getvalue(), "txt": question.encode()}
            fields["json"] = json.dumps({"question": question, "answer": "yes", **meta}).encode()
            for suffix, value in fields.items():
                info = tarfile.TarInfo(f"{i:05d}.{suffix}")
                info.size = len(value)
                archive.addfile(info, io.BytesIO(value))
    return str(path)
