"""sdxl-unbox (arXiv 2410.22366): TopK SAEs on SDXL and Flux (``config.json`` + ``state_dict.pth``); read only."""

from __future__ import annotations

from pathlib import Path

from mmsae.interop.tensors import Config, Tensors, compose, whole
from mmsae.sae import SAE, AffineEncoder, TopK
from mmsae.sae.foreign import library_of, state_of
from mmsae.types import InputError

CFG, WEIGHTS = "config.json", "state_dict.pth"


def recognise(path: Path) -> bool:
    """Whether sdxl-unbox wrote a folder."""
    return library_of(path) == "sdxl_unbox"


def read(path: Path, modality: str = "image") -> SAE:
    """Read a folder of sdxl-unbox; the ``mean.pt`` beside it is of its experiments, its SAE does not use it.

    Args:
        path: The folder.
        modality: Name of the SAE's modality, which the file does not say.

    Raises:
        InputError: Missing, superfluous or differently shaped tensors.
    """
    cfg = Config(path / CFG)
    state = state_of(path / WEIGHTS)
    t = Tensors(path / WEIGHTS, state.get("state_dict", state))
    d_sae, d_in = whole(cfg.need("n_dirs_local"), "n_dirs_local"), whole(cfg.need("d_model"), "d_model")
    named = {"W_enc": t.take("encoder.weight", d_sae, d_in).t(), "b_enc": t.take("latent_bias", d_sae)}
    named |= {"W_dec": t.take("decoder.weight", d_in, d_sae).t(), "b_dec": t.take("pre_bias", d_in)}
    t.done(ignored=("stats_last_nonzero",))
    selector = TopK(whole(cfg.need("k"), "k"))
    return compose(named, AffineEncoder(subtract_decoder_bias=True), selector, modality=modality, source=path)


def write(sae: SAE, folder: str | Path, modality: str | None = None) -> Path:
    """Refuse: sdxl-unbox is code of experiments, and no library that could be tested against.

    Raises:
        InputError: Always.
    """
    raise InputError("mmsae writes no folders of sdxl_unbox: there is no released library that they could be tested on")
