"""sparsify of EleutherAI (``cfg.json`` + ``sae.safetensors``; read by and for version 1.3)."""

from __future__ import annotations

import json
from pathlib import Path

from mmsae.interop.plain import plain
from mmsae.interop.tensors import Config, Tensors, compose, new_folder, whole
from mmsae.sae import SAE, AffineEncoder, GroupMax, TopK
from mmsae.sae.foreign import library_of
from mmsae.types import InputError

CFG, WEIGHTS = "cfg.json", "sae.safetensors"


def recognise(path: Path) -> bool:
    """Whether sparsify wrote a folder."""
    return library_of(path) == "sparsify"


def read(path: Path, modality: str = "image") -> SAE:
    """Read a folder of sparsify.

    Args:
        path: The folder.
        modality: Name of the SAE's modality, which the file does not say.

    Raises:
        InputError: A transcoder, signed codes, missing or superfluous tensors.
    """
    cfg = Config(path / CFG)
    for flag in ("transcode", "skip_connection", "signed"):
        cfg.only(flag, False, False)
    kind, k = cfg.only("activation", "topk", "topk", "groupmax"), whole(cfg.need("k"), "k")
    t = Tensors(path / WEIGHTS)
    d_in = whole(cfg.need("d_in"), "d_in")
    weight = t.take("encoder.weight")
    d_sae = cfg.get("num_latents") or d_in * whole(cfg.need("expansion_factor"), "expansion_factor")
    if tuple(weight.shape) != (d_sae, d_in):
        raise InputError(f"{cfg.file} says {d_sae} latents of width {d_in}, encoder.weight is {tuple(weight.shape)}")
    named = {"W_enc": weight.t(), "b_enc": t.take("encoder.bias", d_sae)}
    named |= {"W_dec": t.take("W_dec", d_sae, d_in), "b_dec": t.take("b_dec", d_in)}
    t.done()
    selector = TopK(k) if kind == "topk" else GroupMax(k)
    return compose(named, AffineEncoder(subtract_decoder_bias=True), selector, modality=modality, source=path)


def write(sae: SAE, folder: str | Path, modality: str | None = None) -> Path:
    """Write a folder that ``sparsify.SparseCoder.load_from_disk`` loads.

    Args:
        sae: The SAE.
        folder: Folder to write.
        modality: Which modality's, where the SAE has several.

    Raises:
        InputError: sparsify has no such model.
    """
    from safetensors.torch import save_file

    p = plain(sae, "sparsify", modality).only("sparsify", ("topk", "groupmax")).subtracting(True)
    d_sae, d_in = p.shape
    cfg = {"activation": p.kind, "expansion_factor": max(1, d_sae // d_in), "normalize_decoder": False}
    cfg |= {"num_latents": d_sae, "k": p.k, "multi_topk": False, "skip_connection": False, "transcode": False}
    t = p.tensors
    named = {"encoder.weight": t["W_enc"].t(), "encoder.bias": t["b_enc"], "W_dec": t["W_dec"], "b_dec": t["b_dec"]}
    with new_folder(folder, WEIGHTS) as temp:
        save_file({n: v.contiguous() for n, v in named.items()}, temp / WEIGHTS, metadata={"format": "pt"})
        (temp / CFG).write_text(json.dumps(cfg | {"d_in": d_in}, indent=1) + "\n")
    return Path(folder)
