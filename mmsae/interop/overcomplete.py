"""overcomplete: a state dict in eval mode (``state_dict.pt``); read by and for version 0.3.

The library's own save is a pickle of the whole module, which mmsae does not load. State dicts say neither the selector
nor k; batch-top-k's threshold is no buffer of the library's class.
"""

from __future__ import annotations

from pathlib import Path

import torch

from mmsae.interop.plain import plain
from mmsae.interop.tensors import Tensors, at_least, compose, more_than, new_folder
from mmsae.sae import SAE, AffineEncoder, JumpReLU, PursuitEncoder, SAEEncoder, Selector, TopK
from mmsae.sae.foreign import library_of, one_file
from mmsae.types import InputError

WEIGHTS = "state_dict.pt"


def recognise(path: Path) -> bool:
    """Whether a state dict of overcomplete is the file, or the only one of the folder."""
    return library_of(path) == "overcomplete"


def read(path: Path, k: int | None = None, threshold: float | None = None, modality: str = "image") -> SAE:
    """Read a state dict of overcomplete: of a TopKSAE, a BatchTopKSAE, a JumpSAE or a MpSAE with a linear encoder.

    Args:
        path: The file, or the folder that has it.
        k: Latents kept a row (TopKSAE), or steps (MpSAE); neither is in the file.
        threshold: Instead of k, of a BatchTopKSAE: its ``running_threshold``, which is not in the file.
        modality: Name of the SAE's modality, which the file does not say.

    Raises:
        InputError: Another encoder or dictionary, or no k and no threshold.
    """
    file = path if path.is_file() else one_file(path, ".pt")
    t = Tensors(file)
    named = {"W_dec": t.take("dictionary._weights")}
    named["W_dec"] = named["W_dec"] * t.take("dictionary.multiplier").exp()
    d_sae, d_in = named["W_dec"].shape
    encoder: SAEEncoder = AffineEncoder(subtract_decoder_bias=False)
    selector: Selector | None = None
    if "thresholds" in t.state:
        named["threshold"], selector = at_least(t.take("thresholds", d_sae).exp()), JumpReLU(log=False)
        if k is not None or threshold is not None:
            raise InputError(f"{file} is a JumpSAE, which has thresholds: give neither k nor threshold")
    elif (k is None) == (threshold is None):
        raise InputError(f"{file} does not say how many latents a row has: give k, or the threshold of a BatchTopKSAE")
    elif threshold is not None:
        named["threshold"] = at_least(torch.full((d_sae,), float(threshold)))
        selector = JumpReLU(log=False)
    if any(n.startswith("encoder.") for n in t.state):
        named["W_enc"] = t.take("encoder.final_block.0.weight", d_sae, d_in).t()
        named["b_enc"] = t.take("encoder.final_block.0.bias", d_sae)
        selector = selector or TopK(k)
    elif k is not None:
        encoder = PursuitEncoder("mp", k, "max")
    t.done()
    return compose(named, encoder, selector, modality=modality, source=file)


def write(sae: SAE, folder: str | Path, modality: str | None = None) -> Path:
    """Write a state dict for a TopKSAE, a JumpSAE or a MpSAE of equal sizes, which a reader has to construct.

    Args:
        sae: The SAE.
        folder: Folder to write.
        modality: Which modality's, where the SAE has several.

    Raises:
        InputError: overcomplete has no such model: it adds no bias in decoding, and its atoms have norm 1.
    """
    p = plain(sae, "overcomplete", modality).only("overcomplete", ("topk", "jumprelu", "matching_pursuit"))
    t = p.tensors
    if t["b_dec"].any():
        raise InputError("overcomplete's decoders have no bias; this SAE's has one that is not 0 (or a mean)")
    if not ((t["W_dec"].norm(dim=1) - 1).abs() < 1e-4).all():
        raise InputError("overcomplete's atoms have norm 1; those of this SAE have not")
    named = {"dictionary._weights": t["W_dec"], "dictionary.multiplier": torch.tensor(0.0)}
    if p.encoder is not None:
        e = p.encoder
        if e.sign != "max" or e.tol or e.stop_on_repeat:
            raise InputError(f"overcomplete's pursuit has sign 'max' and no stop, not sign {e.sign!r}, tol {e.tol}")
    else:
        named |= {"encoder.final_block.0.weight": t["W_enc"].t(), "encoder.final_block.0.bias": t["b_enc"]}
    if p.kind == "jumprelu":
        if not (t["threshold"] > 0).all():
            raise InputError("overcomplete's thresholds are above 0; some of this SAE are not")
        named["thresholds"] = more_than(t["threshold"]).log()
    with new_folder(folder, WEIGHTS) as temp:
        torch.save({n: v.contiguous() for n, v in named.items()}, temp / WEIGHTS)
    return Path(folder)
