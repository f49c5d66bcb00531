"""The top of an SAE's ``cfg.json`` where SAELens can load the folder: as the same model, or not at all."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mmsae.sae.dictionary import Dictionary
from mmsae.sae.encoder import AffineEncoder
from mmsae.sae.selector import ReLU, TopK
from mmsae.sae.thresholds import thresholds
from mmsae.sae.variants.gated import GatedEncoder
from mmsae.sae.variants.matching_pursuit import PursuitEncoder
from mmsae.types import InputError


def fields(
    architecture: str, d_in: int, d_sae: int, subtract: bool = True, rows: str = "none", **more: Any
) -> dict[str, Any]:
    """A SAELens 6 configuration of an architecture; ``more`` are fields that only this one has."""
    top = {"architecture": architecture, "d_in": d_in, "d_sae": d_sae, "dtype": "float32", "device": "cpu"}
    if architecture in ("topk", "abstopk"):
        more = {"rescale_acts_by_decoder_norm": False, **more}
    # "metadata" is there, and empty, so that the version that reads does not take it for a config of before 6.0
    top |= {"apply_b_dec_to_input": subtract, "normalize_activations": rows, "reshape_activations": "none"}
    return top | more | {"metadata": {}}


def pursuit_fields(encoder: PursuitEncoder) -> dict[str, Any]:
    """When a pursuit stops, by SAELens's names.

    Raises:
        InputError: Another pursuit than SAELens has.
    """
    if encoder.kind != "mp" or encoder.sign != "relu":
        raise InputError(f"SAELens has pursuits of kind 'mp', sign 'relu', not {encoder.kind!r}, {encoder.sign!r}")
    stops = {"residual_threshold": encoder.tol or 0.0, "stop_on_duplicate_support": encoder.stop_on_repeat}
    return {"max_iterations": encoder.steps, **stops}


def unknown(d_in: int, d_sae: int) -> dict[str, Any]:
    """A configuration that SAELens refuses, since it has no such model."""
    return {"architecture": "mmsae", "d_in": d_in, "d_sae": d_sae, "dtype": "float32", "device": "cpu"}


def saelens_fields(sae: Any) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """Configuration by which SAELens loads the folder of this SAE, and the tensors that it needs beside the SAE's own.

    None where SAELens has no such model: several modalities, other parts, statistics that it does not keep.
    """
    dictionary, n = dict(sae.dictionaries).get("shared"), sae.normaliser
    if len(sae.modalities) != 1 or type(dictionary) is not Dictionary or not dictionary.use_bias:
        return None
    if n.centre or n.scale != "none" or n.unit_in or n.unit_out:
        return None
    found = _known(sae)
    if found is None:
        return None
    architecture, subtract, own, tensors = found
    rows = "layer_norm" if n.standardise else "none"
    return fields(architecture, sae.d_in[sae.modalities[0]], sae.d_sae, subtract, rows, **own), tensors


def _known(sae: Any) -> tuple[str, bool, dict[str, Any], dict[str, Tensor]] | None:
    """Architecture, whether the decoder's bias is subtracted, and fields and tensors that only this one has."""
    encoder, selector = sae.encoder, sae.selector
    if type(encoder) is PursuitEncoder and encoder.kind == "mp" and encoder.sign == "relu":
        return "matching_pursuit", True, pursuit_fields(encoder), {}
    if type(encoder) is GatedEncoder and type(selector) is ReLU:
        return "gated", True, {}, {}
    if type(encoder) is not AffineEncoder or not encoder.use_bias:
        return None
    subtract = encoder.subtract_decoder_bias
    if type(selector) is TopK and selector.score_name != "norm":
        return ("abstopk" if selector.signed else "topk"), subtract, {"k": selector.k}, {}
    if type(selector) is ReLU:
        return "standard", subtract, {}, {}
    try:
        theta = thresholds(sae, sae.modalities[0])
    except InputError:  # it has none, or none yet
        return None
    return "jumprelu", subtract, {}, {"threshold": theta.float()}
