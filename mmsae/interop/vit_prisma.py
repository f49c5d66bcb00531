"""ViT-Prisma (``config.json`` + one ``.pt`` of weights, as on the hub); read only."""

from __future__ import annotations

from pathlib import Path

from mmsae.interop.tensors import Config, Tensors, compose, whole
from mmsae.sae import SAE, AffineEncoder, GatedEncoder, Normaliser, ReLU, TopK
from mmsae.sae.foreign import library_of, one_file, state_of
from mmsae.types import InputError

CFG = "config.json"


def recognise(path: Path) -> bool:
    """Whether ViT-Prisma wrote a folder."""
    return library_of(path) == "vit_prisma"


def read(path: Path, modality: str = "image") -> SAE:
    """Read a folder of ViT-Prisma.

    Args:
        path: The folder.
        modality: Name of the SAE's modality, which the file does not say.

    Raises:
        InputError: A transcoder, another architecture or activation, several files of weights, weights that are
            pickled together with their configuration, missing or superfluous tensors.
    """
    cfg = Config(path / CFG)
    cfg.only("is_transcoder", False, False)
    architecture = cfg.only("architecture", "standard", "standard", "gated")
    activation = cfg.only("activation_fn_str", "relu", "relu", "topk")
    norm = cfg.only("normalize_activations", "layer_norm", "layer_norm", "none", None)
    file = one_file(path, ".pt")
    if file is None:
        raise InputError(f"{path} has several .pt files: one of them must be the weights, and alone")
    state = state_of(file)
    t = Tensors(file, state.get("state_dict", state))
    named = {"W_dec": t.take("W_dec")}
    d_sae, d_in = named["W_dec"].shape
    if d_in != whole(cfg.need("d_in"), "d_in"):
        raise InputError(f"{cfg.file} says d_in {cfg.get('d_in')}, W_dec has width {d_in}")
    named |= {"W_enc": t.take("W_enc", d_in, d_sae), "b_dec": t.take("b_dec", d_in)}
    b_enc = t.take("b_enc", d_sae)  # a gated one has it too, and does not use it
    gated = ("b_gate", "b_mag", "r_mag")
    named |= {n: t.take(n, d_sae) for n in gated} if architecture == "gated" else {"b_enc": b_enc}
    t.done()
    encoder, selector = AffineEncoder(subtract_decoder_bias=True), ReLU()
    if architecture == "gated":
        encoder = GatedEncoder()
    elif activation == "topk":
        selector = TopK(whole((cfg.get("activation_fn_kwargs") or {}).get("k"), "k of activation_fn_kwargs"))
    normaliser = Normaliser(standardise=True) if norm == "layer_norm" else None
    return compose(named, encoder, selector, normaliser, modality, path)


def write(sae: SAE, folder: str | Path, modality: str | None = None) -> Path:
    """Refuse: its configuration is that of a training run, most of which an SAE does not have.

    Raises:
        InputError: Always.
    """
    raise InputError("mmsae writes no folders of vit_prisma, whose config.json is that of a training run")
