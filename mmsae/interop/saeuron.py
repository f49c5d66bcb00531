"""SAeUron (arXiv 2501.18052): SAEs on denoisers, in a layout of sparsify with options of their own; read only."""

from __future__ import annotations

from pathlib import Path

from mmsae.interop.sparsify import CFG, WEIGHTS
from mmsae.interop.tensors import Config, Tensors, compose, whole
from mmsae.sae import SAE, AffineEncoder, JumpReLU, Normaliser, TopK
from mmsae.sae.foreign import library_of
from mmsae.types import InputError


def recognise(path: Path) -> bool:
    """Whether SAeUron wrote a folder."""
    return library_of(path) == "saeuron"


def read(path: Path, modality: str = "image", threshold: float | None = None) -> SAE:
    """Read a folder of SAeUron.

    Args:
        path: The folder.
        modality: Name of the SAE's modality, which the file does not say.
        threshold: Pre-code above which a latent fires, where the SAE was trained with ``batch_topk``: there the library
            ranks over all rows that it is given, also at inference, and keeps no threshold.

    Raises:
        InputError: The codes of a row depend on other rows and no threshold is given; missing or superfluous tensors.
    """
    cfg = Config(path / CFG)
    cfg.only("sample_topk", False, False)
    t = Tensors(path / WEIGHTS)
    weight, d_in = t.take("encoder.weight"), whole(cfg.need("d_in"), "d_in")
    d_sae = len(weight)
    named = {"W_enc": weight.t(), "b_enc": t.take("encoder.bias", d_sae)}
    named |= {"W_dec": t.take("W_dec", d_sae, d_in), "b_dec": t.take("b_dec", d_in)}
    t.done()
    if not cfg.get("batch_topk", False):
        selector = TopK(whole(cfg.need("k"), "k"))
    elif threshold is None:
        raise InputError(f"{cfg.file} has batch_topk, which ranks over all rows together: give a threshold")
    else:
        selector, named["threshold"] = JumpReLU(log=False), weight.new_full((d_sae,), threshold)
    normaliser = Normaliser(standardise=True) if cfg.get("input_unit_norm", False) else None
    encoder = AffineEncoder(subtract_decoder_bias=True)
    return compose(named, encoder, selector, normaliser, modality, path)


def write(sae: SAE, folder: str | Path, modality: str | None = None) -> Path:
    """Refuse: SAeUron reads what sparsify writes.

    Raises:
        InputError: Always.
    """
    raise InputError("mmsae writes no folders of saeuron; its TopK SAEs load those of sparsify: --to sparsify")
