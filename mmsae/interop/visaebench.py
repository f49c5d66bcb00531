"""visaebench (``sae.pt`` or ``model.safetensors`` + ``config.json`` or YAML; read by and for version 0.1)."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from mmsae.interop.plain import plain
from mmsae.interop.tensors import Config, Tensors, at_least, compose, new_folder, whole
from mmsae.sae import SAE, AffineEncoder, JumpReLU, Selector, TopK
from mmsae.sae.foreign import library_of, visaebench_files
from mmsae.types import InputError

WEIGHTS, CFG = "sae.pt", "config.json"


def recognise(path: Path) -> bool:
    """Whether visaebench reads a folder."""
    return library_of(path) == "visaebench"


def read(path: Path, modality: str = "image") -> SAE:
    """Read a folder of visaebench.

    Args:
        path: The folder.
        modality: Name of the SAE's modality, which the file does not say.

    Raises:
        InputError: Another activation, no threshold (which the library takes for 0, so that codes are dense),
            superfluous tensors.
    """
    weights, described = visaebench_files(path)
    cfg, t = Config(described), Tensors(weights)
    if "encoder.weight" in t.state:
        named = {"W_enc": t.take("encoder.weight").t(), "W_dec": t.take("decoder.weight")}
        biases = ("encoder.bias", "decoder.bias")
    else:
        named = {"W_enc": t.take("encoder.final_block.0.weight").t(), "W_dec": t.take("dictionary._weights")}
        named["W_dec"] = named["W_dec"] * t.take("dictionary.multiplier").exp()
        biases = ("encoder.final_block.0.bias", "")
    d_sae, d_in = named["W_dec"].shape
    for field, value in (("hidden_dim", d_sae), ("input_dim", d_in)):
        if cfg.get(field, value) != value:
            raise InputError(f"{described} says {field} {cfg.get(field)!r}, the weights have {value}")
    named["b_enc"] = t.take(biases[0], d_sae)
    if (bias := t.pop(biases[1], d_in)) is not None:
        named["b_dec"] = bias
    selector, threshold = _selector(cfg, t, d_sae)
    named |= {} if threshold is None else {"threshold": threshold}
    t.done()
    return compose(named, AffineEncoder(subtract_decoder_bias=False), selector, modality=modality, source=path)


def _selector(cfg: Config, t: Tensors, d_sae: int) -> tuple[Selector, Tensor | None]:
    field = next(f for f in ("activation", "sae_type", "architecture") if f in cfg.fields)
    kind = cfg.only(field, None, "topk", "batchtopk", "jumprelu")
    if kind == "topk":
        return TopK(whole(cfg.need("k"), "k")), None
    if kind == "jumprelu":
        name = "jump_thresholds" if "jump_thresholds" in t.state else "thresholds"
        return JumpReLU(log=False), t.take(name, d_sae)
    stored, given = t.pop("_running_threshold"), cfg.get("threshold")
    if given is None and stored is None:
        raise InputError(f"{cfg.file} does not say threshold, nor has {t.file.name} a _running_threshold")
    value = stored if given is None else torch.tensor(float(given))
    return JumpReLU(log=False), at_least(value).expand(d_sae)


def write(sae: SAE, folder: str | Path, modality: str | None = None) -> Path:
    """Write a folder that ``visaebench.hub.loader.load_sae`` loads.

    Args:
        sae: The SAE.
        folder: Folder to write.
        modality: Which modality's, where the SAE has several.

    Raises:
        InputError: visaebench has no such model.
    """
    p = plain(sae, "visaebench", modality).only("visaebench", ("topk", "jumprelu")).subtracting(False)
    d_sae, d_in = p.shape
    t = p.tensors
    named = {"encoder.weight": t["W_enc"].t(), "encoder.bias": t["b_enc"], "decoder.weight": t["W_dec"]}
    named["decoder.bias"] = t["b_dec"]
    cfg = {"activation": p.kind, "input_dim": d_in, "hidden_dim": d_sae} | ({"k": p.k} if p.k else {})
    if p.kind == "jumprelu":
        named["jump_thresholds"] = t["threshold"]
    with new_folder(folder, WEIGHTS) as temp:
        torch.save({n: v.contiguous() for n, v in named.items()}, temp / WEIGHTS)
        (temp / CFG).write_text(json.dumps(cfg, indent=1) + "\n")
    return Path(folder)
