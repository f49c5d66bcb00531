"""saev (one file: a line of JSON, then a state dict; read by and for version 0.1)."""

from __future__ import annotations

import io
import json
from pathlib import Path

import torch

from mmsae.interop.plain import plain
from mmsae.interop.tensors import Config, Tensors, compose, new_folder, whole
from mmsae.sae import SAE, AffineEncoder, ReLU
from mmsae.sae.foreign import header, library_of, one_file, state_of
from mmsae.types import InputError

WEIGHTS = "sae.pt"


def recognise(path: Path) -> bool:
    """Whether saev wrote the file, or the only one of the folder."""
    return library_of(path) == "saev"


def read(path: Path, modality: str = "image") -> SAE:
    """Read a file of saev.

    Args:
        path: The file, or the folder that has it.
        modality: Name of the SAE's modality, which the file does not say.

    Raises:
        InputError: A file with a ``schema``, which versions that encode differently share; missing or superfluous
            tensors.
    """
    file = path if path.is_file() else one_file(path, ".pt")
    cfg = Config(file, header(file))
    if "schema" in cfg.fields:
        raise InputError(
            f"{file} has schema {cfg.get('schema')!r}: development versions of saev that subtract the decoder's bias "
            "and ones that do not write it alike; mmsae reads files of saev 0.1, which have no schema"
        )
    d_in, factor = whole(cfg.need("d_vit"), "d_vit"), whole(cfg.need("exp_factor"), "exp_factor")
    with open(file, "rb") as f:
        f.readline()
        rest = io.BytesIO(f.read())
    t = Tensors(file, state_of(file, rest))
    named = {"W_enc": t.take("W_enc", d_in, d_in * factor), "b_enc": t.take("b_enc", d_in * factor)}
    named |= {"W_dec": t.take("W_dec", d_in * factor, d_in), "b_dec": t.take("b_dec", d_in)}
    t.done()
    return compose(named, AffineEncoder(subtract_decoder_bias=True), ReLU(), modality=modality, source=file)


def write(sae: SAE, folder: str | Path, modality: str | None = None) -> Path:
    """Write ``sae.pt``, which ``saev.nn.load`` loads.

    Args:
        sae: The SAE.
        folder: Folder to write.
        modality: Which modality's, where the SAE has several.

    Raises:
        InputError: saev has no such model.
    """
    p = plain(sae, "saev", modality).only("saev", ("relu",)).subtracting(True)
    d_sae, d_in = p.shape
    if d_sae % d_in:
        raise InputError(f"saev has a whole number of latents per input feature, not {d_sae} of width {d_in}")
    with new_folder(folder, WEIGHTS) as temp, open(temp / WEIGHTS, "wb") as f:
        f.write((json.dumps({"d_vit": d_in, "exp_factor": d_sae // d_in}) + "\n").encode())
        torch.save({n: t.contiguous() for n, t in p.tensors.items()}, f)
    return Path(folder)
