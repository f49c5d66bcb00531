"""SAELens (``cfg.json`` + ``sae_weights.safetensors``; read by and for version 6, older configurations too)."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmsae.interop.plain import Plain, plain
from mmsae.interop.tensors import Config, Tensors, compose, new_folder, whole
from mmsae.sae import SAE, AffineEncoder, GatedEncoder, JumpReLU, Normaliser, PursuitEncoder, ReLU, TopK
from mmsae.sae.foreign import library_of
from mmsae.sae.saelens_fields import fields, pursuit_fields
from mmsae.types import InputError

CFG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
ARCHITECTURES = ("standard", "topk", "abstopk", "jumprelu", "gated", "matching_pursuit")
NAMES = {"relu": "standard"} | {a: a for a in ARCHITECTURES[1:]}  # ours, theirs


def recognise(path: Path) -> bool:
    """Whether SAELens wrote a folder."""
    return library_of(path) == "saelens"


def _modern(cfg: Config) -> dict[str, Any]:
    """The fields of a configuration, those of before version 6 by their new names."""
    f = dict(cfg.fields)
    if (activation := f.get("activation_fn_str", f.get("activation_fn"))) is not None:
        if activation not in ("relu", "topk"):
            raise InputError(f"{cfg.file} has activation_fn {activation!r}; mmsae reads 'relu' or 'topk'")
        if activation == "topk":
            f |= {"architecture": "topk", "k": f.get("k", (f.get("activation_fn_kwargs") or {}).get("k"))}
    f.setdefault("architecture", "standard")
    norm = f.get("normalize_activations")
    if isinstance(norm, bool) or norm is None:
        f["normalize_activations"] = "expected_average_only_in" if norm else "none"
    return f


def read(path: Path, modality: str = "image", norm_scaling_factor: float | None = None) -> SAE:
    """Read a folder of SAELens.

    Args:
        path: The folder.
        modality: Name of the SAE's modality, which the file does not say.
        norm_scaling_factor: Factor of the activations, where ``normalize_activations`` is ``expected_average_only_in``
            and it was not folded into the weights: no file holds it.

    Raises:
        InputError: An architecture or a field that mmsae cannot express, missing or superfluous tensors.
    """
    cfg = Config(path / CFG)
    cfg = Config(cfg.file, _modern(cfg))
    architecture = cfg.only("architecture", None, *ARCHITECTURES)
    cfg.only("reshape_activations", "none", "none", "hook_z")  # of heads, which rows of an SAE are not split into
    t = Tensors(path / WEIGHTS)
    d_in, d_sae = whole(cfg.need("d_in"), "d_in"), whole(cfg.need("d_sae"), "d_sae")
    subtract = bool(cfg.get("apply_b_dec_to_input", True))
    named = {"W_dec": t.take("W_dec", d_sae, d_in), "b_dec": t.take("b_dec", d_in)}
    selector = encoder = None
    if architecture == "matching_pursuit":
        encoder = _pursuit(cfg, d_in)
        if not subtract:
            del named["b_dec"]  # neither direction uses it
    else:
        named["W_enc"] = t.take("W_enc", d_in, d_sae)
        biases = ("b_gate", "b_mag", "r_mag") if architecture == "gated" else ("b_enc",)
        named |= {n: t.take(n, d_sae) for n in biases}
    if architecture in ("topk", "abstopk"):
        selector = TopK(whole(cfg.need("k"), "k"), score="abs" if architecture == "abstopk" else "value")
        if cfg.get("rescale_acts_by_decoder_norm", False):
            norms = named["W_dec"].norm(dim=1)
            named |= {"W_enc": named["W_enc"] * norms, "b_enc": named["b_enc"] * norms}
            named["W_dec"] = named["W_dec"] / norms[:, None]
    if architecture == "jumprelu":
        named["threshold"] = t.take("threshold", d_sae)
        selector = JumpReLU(log=False)
    if architecture in ("standard", "gated"):
        selector = ReLU()
    if (factor := t.pop("scaling_factor")) is not None and not torch.allclose(factor, torch.ones_like(factor)):
        raise InputError(f"{t.file} has a scaling_factor that is not 1, which current versions of SAELens refuse too")
    t.done()
    named, normaliser = _normalised(cfg, named, architecture, norm_scaling_factor)
    if architecture == "gated":
        named, encoder = Plain("gated", named, subtract=subtract).subtracting(True).tensors, GatedEncoder()
    encoder = encoder or AffineEncoder(subtract_decoder_bias=subtract)
    return compose(named, encoder, selector, normaliser, modality, path)


def _pursuit(cfg: Config, d_in: int) -> PursuitEncoder:
    steps = d_in if cfg.get("max_iterations") is None else whole(cfg.get("max_iterations"), "max_iterations")
    tol = float(cfg.get("residual_threshold", 1e-2))
    repeat = bool(cfg.get("stop_on_duplicate_support", True))
    return PursuitEncoder("mp", steps, "relu", tol if tol > 0 else None, stop_on_repeat=repeat)


def _normalised(
    cfg: Config, named: dict[str, Tensor], architecture: str, factor: float | None
) -> tuple[dict[str, Tensor], Normaliser | None]:
    """Weights and normaliser for what SAELens does to rows."""
    kinds = ("none", "layer_norm", "constant_norm_rescale", "expected_average_only_in")
    kind = cfg.only("normalize_activations", "none", *kinds)
    if kind in ("none", "layer_norm"):
        return named, Normaliser(standardise=True) if kind == "layer_norm" else None
    if architecture == "matching_pursuit":
        raise InputError(f"{cfg.file} has normalize_activations {kind!r}, whose factor a tied encoder cannot take")
    if kind == "expected_average_only_in" and factor is None:
        raise InputError(
            f"{cfg.file} has normalize_activations 'expected_average_only_in', and no file holds the factor: give "
            "norm_scaling_factor"
        )
    factor = math.sqrt(named["W_dec"].shape[1]) if kind == "constant_norm_rescale" else float(factor)
    named = {**named, "W_enc": named["W_enc"] * factor}
    named |= {n: named[n] / factor for n in ("W_dec", "b_dec")}
    return named, Normaliser(unit_in=True) if kind == "constant_norm_rescale" else None


def write(sae: SAE, folder: str | Path, modality: str | None = None) -> Path:
    """Write a folder that ``sae_lens.SAE.load_from_disk`` loads.

    Args:
        sae: The SAE.
        folder: Folder to write.
        modality: Which modality's, where the SAE has several.

    Raises:
        InputError: SAELens has no such model.
    """
    from safetensors.torch import save_file

    p = plain(sae, "SAELens", modality).only("SAELens", tuple(NAMES), ("none", "unit", "standardise"))
    d_sae, d_in = p.shape
    if p.rows == "unit":
        p = replace(p, tensors=_rescaled(p, math.sqrt(d_in)))
    own: dict[str, Any] = {"k": p.k} if p.kind in ("topk", "abstopk") else {}
    own |= pursuit_fields(p.encoder) if p.encoder else {}
    rows = {"none": "none", "unit": "constant_norm_rescale", "standardise": "layer_norm"}[p.rows]
    cfg = fields(NAMES[p.kind], d_in, d_sae, p.subtract, rows, **own)
    with new_folder(folder, CFG) as temp:
        save_file({n: t.contiguous() for n, t in p.tensors.items()}, temp / WEIGHTS, metadata={"format": "pt"})
        (temp / CFG).write_text(json.dumps(cfg, indent=2) + "\n")
    return Path(folder)


def _rescaled(p: Plain, factor: float) -> dict[str, Tensor]:
    """Weights for rows of norm ``factor`` instead of 1."""
    if p.kind == "matching_pursuit":
        raise InputError("SAELens rescales rows to the norm sqrt(d_in), whose factor a tied encoder cannot take")
    t = dict(p.tensors)
    return {**t, "W_enc": t["W_enc"] / factor, "W_dec": t["W_dec"] * factor, "b_dec": t["b_dec"] * factor}
