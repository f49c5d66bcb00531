"""The published VL-SAE checkpoints (``ssfgunner/VL-SAE``) and the two baselines of the same code base.

They are plain state dicts and store neither k nor the ratio: those are in the file name
(``openclip_<model>_VL_SAE_256_8_best.pth`` is k 256, ratio 8) or must be given. ``vision`` becomes ``image``.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from mmsae.sae import SAE, AffineEncoder, Dictionary, DistanceEncoder, PerModalityEncoder, SAEEncoder, TopK
from mmsae.types import InputError

_NAMES = {"image": "vision", "text": "text"}


def k_and_ratio(name: str) -> tuple[int, int] | None:
    """``(k, ratio)`` from a published file name, or None."""
    found = re.search(r"_(\d+)_(\d+)_best", name)
    return (int(found[1]), int(found[2])) if found else None


def recognise(state: dict[str, Tensor]) -> str | None:
    """``vl_sae``, ``dual``, ``shared`` or ``aligner`` by the keys of a state dict; None if it is none of them."""
    if "vision_projection.weight" in state:
        return "aligner"  # looked for first: it has a vision_decoder.weight too
    for kind, key in (("vl_sae", "encoder"), ("dual", "v_encoder.weight"), ("shared", "decoder.0.weight")):
        if key in state:
            return kind
    return None


@torch.no_grad()
def from_state(state: dict[str, Tensor], k: int, strict: bool = False) -> SAE:
    """Build the SAE of a published state dict.

    ``strict`` is the published keep rule (see :class:`mmsae.sae.TopK`).
    """
    kind = recognise(state)
    per_modality = {m: Dictionary(norm="free") for m in _NAMES}
    if kind == "vl_sae":
        encoder: SAEEncoder = DistanceEncoder()
        dictionaries, decoders = per_modality, {m: f"{v}_decoder" for m, v in _NAMES.items()}
    elif kind == "dual":
        encoder = PerModalityEncoder(AffineEncoder(subtract_decoder_bias=False))
        dictionaries, decoders = per_modality, {m: f"{v}_decoder.0" for m, v in _NAMES.items()}
    elif kind == "shared":
        encoder = AffineEncoder(subtract_decoder_bias=False)
        dictionaries, decoders = {"shared": Dictionary(norm="free")}, {"shared": "decoder.0"}
    else:
        raise InputError(f"not a published VL-SAE checkpoint ({kind or 'unknown layout'}); it has {sorted(state)[:6]}")
    width, d_sae = state[next(iter(decoders.values())) + ".weight"].shape
    sae = SAE(width, d_sae, encoder=encoder, selector=TopK(k, strict=strict), dictionaries=dictionaries)
    sae.fresh = False
    for key, name in decoders.items():
        sae.dictionaries[key].weight.copy_(state[name + ".weight"].t())
        sae.dictionaries[key].bias.copy_(state[name + ".bias"])
    if kind == "vl_sae":
        encoder.weight.copy_(state["encoder"])
        return sae.eval().requires_grad_(False)
    parts = {"encoder": encoder}
    if kind == "dual":
        parts = {"v_encoder": encoder.encoders["image"], "t_encoder": encoder.encoders["text"]}
    for name, part in parts.items():
        part.weight.copy_(state[name + ".weight"])
        part.bias.copy_(state[name + ".bias"])
    return sae.eval().requires_grad_(False)


def load(path: str | Path, k: int | None = None, strict: bool = False) -> SAE:
    """Load a published VL-SAE (or SAE_D, SAE_V baseline) ``.pth``; never unpickles anything but tensors.

    Args:
        path: The file.
        k: Latents kept a row; needed where the file name does not say it.
        strict: Keep rule of the published code, which differs for ties only.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no checkpoint file at {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # torch raises a dozen kinds for broken or unsafe files; each means the same to the user
        why = f"{type(e).__name__}: {str(e).splitlines()[0]}"
        raise InputError(f"{path} cannot be read as a file of tensors ({why})") from e
    named = k_and_ratio(path.name)
    if k is None:
        if named is None:
            raise InputError(f"{path.name} does not say k (names end in _<k>_<ratio>_best.pth): give k")
        k = named[0]
    sae = from_state(state, k, strict)
    width = next(iter(sae.d_in.values()))
    if named and named[1] * width != sae.d_sae:
        raise InputError(f"{path.name} says ratio {named[1]} of width {width}, the file has {sae.d_sae} latents")
    return sae
