"""dictionary_learning (``ae.pt``, a state dict, + ``config.json``; read by and for version 0.1)."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from mmsae.interop.plain import Plain, plain
from mmsae.interop.tensors import Config, Tensors, compose, new_folder, whole
from mmsae.sae import SAE, AffineEncoder, GatedEncoder, JumpReLU, ReLU, TopK
from mmsae.sae.foreign import library_of
from mmsae.types import InputError

CFG, WEIGHTS = "config.json", "ae.pt"
CLASSES = {
    "relu": ("StandardTrainer", "AutoEncoderNew"),
    "topk": ("TopKTrainer", "AutoEncoderTopK"),
    "jumprelu": ("JumpReluTrainer", "JumpReluAutoEncoder"),
    "gated": ("GatedSAETrainer", "GatedAutoEncoder"),
}
"""Trainer and class by which each kind is written; AutoEncoder, for one, is renormalised when it is loaded."""


def recognise(path: Path) -> bool:
    """Whether dictionary_learning wrote a folder."""
    return library_of(path) == "dictionary_learning"


def read(path: Path, modality: str = "image") -> SAE:
    """Read a folder of dictionary_learning, as it computes codes outside training.

    Args:
        path: The folder.
        modality: Name of the SAE's modality, which the file does not say.

    Raises:
        InputError: A class that mmsae does not know, a threshold that was never learned, superfluous tensors.
    """
    cfg = Config(path / CFG)
    cfg = Config(cfg.file, cfg.need("trainer"))
    kinds = ("AutoEncoder", *(c for _, c in CLASSES.values()), "BatchTopKSAE", "MatryoshkaBatchTopKSAE")
    kind = cfg.only("dict_class", None, *kinds)
    t = Tensors(path / WEIGHTS)
    encoder, selector = AffineEncoder(subtract_decoder_bias=True), ReLU()
    plain_names = kind in ("JumpReluAutoEncoder", "MatryoshkaBatchTopKSAE")
    if plain_names:
        named = {"W_enc": t.take("W_enc"), "W_dec": t.take("W_dec")}
    else:
        named = {"W_enc": t.take("encoder.weight").t(), "W_dec": t.take("decoder.weight").t()}
    d_sae, d_in = named["W_dec"].shape
    bias = {"AutoEncoder": "bias", "AutoEncoderNew": "decoder.bias", "GatedAutoEncoder": "decoder_bias"}
    named["b_dec"] = t.take(bias.get(kind, "b_dec"), d_in)
    if kind == "GatedAutoEncoder":
        encoder = GatedEncoder()
        named |= {ours: t.take(n, d_sae) for ours, n in (("b_gate", "gate_bias"), ("b_mag", "mag_bias"))}
        named["r_mag"] = t.take("r_mag", d_sae)
    else:
        named["b_enc"] = t.take("b_enc" if plain_names else "encoder.bias", d_sae)
    if kind in ("AutoEncoderNew", "JumpReluAutoEncoder"):
        encoder = AffineEncoder(subtract_decoder_bias=False)
    if kind == "AutoEncoder":
        named = _unit(named)
    if kind == "AutoEncoderTopK":
        selector = TopK(whole(t.take("k").item(), "k"))
        t.pop("threshold")  # of a mode that is not the default
    elif kind == "JumpReluAutoEncoder":
        named["threshold"], selector = t.take("threshold", d_sae), JumpReLU(log=False)
    elif kind in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
        named["threshold"], selector = _threshold(t).expand(d_sae), JumpReLU(log=False)
        for ignored in ("k", "group_sizes"):
            t.pop(ignored)
    t.done()
    return compose(named, encoder, selector, modality=modality, source=path)


def _unit(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """Atoms of norm 1 and the encoder scaled to match, as the library does when it loads an AutoEncoder."""
    norms = named["W_dec"].norm(dim=1)
    if torch.allclose(norms, torch.ones_like(norms)):
        return named
    scaled = {"W_enc": named["W_enc"] * norms, "b_enc": named["b_enc"] * norms}
    return {**named, **scaled, "W_dec": named["W_dec"] / norms[:, None]}


def _threshold(t: Tensors) -> Tensor:
    value = t.take("threshold")
    if value < 0:
        raise InputError(
            f"{t.file} has threshold {float(value):g}, which stands for none: its training ended before it was learned"
        )
    return value


def write(sae: SAE, folder: str | Path, modality: str | None = None) -> Path:
    """Write a folder that ``dictionary_learning.utils.load_dictionary`` loads.

    Args:
        sae: The SAE.
        folder: Folder to write.
        modality: Which modality's, where the SAE has several.

    Raises:
        InputError: dictionary_learning has no such model.
    """
    p = plain(sae, "dictionary_learning", modality).only("dictionary_learning", tuple(CLASSES))
    d_sae, d_in = p.shape
    trainer, kind = CLASSES[p.kind]
    cfg = {"trainer_class": trainer, "dict_class": kind, "activation_dim": d_in, "dict_size": d_sae}
    cfg |= {"layer": 0, "lm_name": "none", "submodule_name": "none"} | ({"k": p.k} if p.k else {})
    with new_folder(folder, WEIGHTS) as temp:
        torch.save({n: t.contiguous() for n, t in _state(p).items()}, temp / WEIGHTS)
        (temp / CFG).write_text(json.dumps({"trainer": cfg, "buffer": {}}, indent=1) + "\n")
    return Path(folder)


def _state(p: Plain) -> dict[str, Tensor]:
    t = p.subtracting(p.kind in ("topk", "gated")).tensors
    if p.kind == "jumprelu":
        return {n: t[n] for n in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")}
    linear = {"encoder.weight": t["W_enc"].t(), "decoder.weight": t["W_dec"].t()}
    if p.kind == "gated":
        biases = {"decoder_bias": t["b_dec"], "gate_bias": t["b_gate"], "mag_bias": t["b_mag"], "r_mag": t["r_mag"]}
        return linear | biases
    linear["encoder.bias"] = t["b_enc"]
    if p.kind == "relu":
        return linear | {"decoder.bias": t["b_dec"]}
    k = torch.tensor(p.k, dtype=torch.int)
    return linear | {"b_dec": t["b_dec"], "k": k, "threshold": torch.tensor(-1.0)}
