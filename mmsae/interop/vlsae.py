"""The published VL-SAE checkpoints (``ssfgunner/VL-SAE``) and the two baselines of the same code base.

They are plain state dicts and store neither k nor the ratio: those are in the file name
(``openclip_<model>_VL_SAE_256_8_best.pth`` is k 256, ratio 8) or must be given. ``vision`` becomes ``image``.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from mmsae.interop.tensors import new_folder
from mmsae.sae import SAE, AffineEncoder, Dictionary, DistanceEncoder, PerModalityEncoder, SAEEncoder, TopK
from mmsae.sae.foreign import VL_SAE_KEYS, library_of, one_file, state_of
from mmsae.types import InputError

_NAMES = {"image": "vision", "text": "text"}


def k_and_ratio(name: str) -> tuple[int, int] | None:
    """``(k, ratio)`` from a published file name, or None."""
    found = re.search(r"_(\d+)_(\d+)_best", name)
    return (int(found[1]), int(found[2])) if found else None


def recognise(path: Path) -> bool:
    """Whether the file, or the only one of the folder, is of the VL-SAE code base."""
    return library_of(path) == "vlsae"


def kind_of(state: dict[str, Tensor]) -> str | None:
    """``vl_sae``, ``dual``, ``shared`` or ``aligner`` by the keys of a state dict; None if it is none of them."""
    if "vision_projection.weight" in state:
        return "aligner"  # looked for first: it has a vision_decoder.weight too
    return next((kind for key, kind in VL_SAE_KEYS.items() if key in state), None)


@torch.no_grad()
def from_state(state: dict[str, Tensor], k: int, strict: bool = False) -> SAE:
    """Build the SAE of a published state dict.

    ``strict`` is the published keep rule (see :class:`mmsae.sae.TopK`).
    """
    kind = kind_of(state)
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


def read(path: Path, k: int | None = None, strict: bool = False) -> SAE:
    """Read a published VL-SAE (or SAE_D, SAE_V baseline) ``.pth``.

    Args:
        path: The file, or the folder that has it.
        k: Latents kept a row; needed where the file name does not say it.
        strict: Keep rule of the published code, which differs for ties only.

    Raises:
        InputError: Another layout, no k, or a ratio in the file name that is not that of the weights.
    """
    path = path if path.is_file() else one_file(path, ".pth") or path
    state = state_of(path)
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


def write(sae: SAE, folder: str | Path, modality: str | None = None) -> Path:
    """Write ``vl_sae_<k>_<ratio>_best.pth``, a state dict as the published ones.

    Args:
        sae: An SAE over ``image`` and ``text``, as :func:`read` makes them.
        folder: Folder to write.
        modality: Not to be given: the file has both.

    Raises:
        InputError: Other parts or modalities than a VL-SAE has.
    """
    n, d_in = sae.normaliser, max(sae.d_in.values())
    has = {"encoder": sae.encoder.name, "selector": sae.selector.name, "dictionaries": ", ".join(sae.dictionaries)}
    needs = {"encoder": "distance", "selector": "topk", "dictionaries": "image, text"}
    if odd := [f"{slot} {has[slot]!r}, not {name!r}" for slot, name in needs.items() if has[slot] != name]:
        raise InputError(f"this SAE has {odd[0]}: it is no VL-SAE")
    if modality or n.per_row or n.centre or n.scale != "none" or sae.d_sae % d_in:
        raise InputError("a VL-SAE has both modalities, no normaliser, and a whole number of latents per input feature")
    state = {"encoder": sae.encoder.weight}
    for m, v in _NAMES.items():
        dictionary = sae.dictionaries[m]
        bias = dictionary.rows().new_zeros(d_in) if dictionary.bias is None else dictionary.bias
        state |= {f"{v}_decoder.weight": dictionary.rows().t(), f"{v}_decoder.bias": bias}
    name = f"vl_sae_{sae.selector.k}_{sae.d_sae // d_in}_best.pth"
    with new_folder(folder, name) as temp:
        torch.save({n: t.detach().float().cpu().contiguous() for n, t in state.items()}, temp / name)
    return Path(folder)
