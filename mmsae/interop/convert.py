"""Reading another library's checkpoint, and writing it as an SAE folder."""

from __future__ import annotations

from pathlib import Path

from mmsae.files import disk_errors
from mmsae.interop import vlsae
from mmsae.sae import SAE
from mmsae.types import InputError


def load(path: str | Path, k: int | None = None, strict: bool = False) -> SAE:
    """Load a published VL-SAE (or SAE_D, SAE_V baseline) ``.pth``.

    Args:
        path: The file.
        k: Latents kept a row; needed where the file name does not say it.
        strict: Keep rule of the published code, which differs for ties only.

    Raises:
        InputError: No such file, an unsafe or unknown one, or k missing.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no checkpoint file at {path}")
    return vlsae.load_file(path, k, strict)


def convert(checkpoint: str, out: str, k: int | None = None, strict: bool = False) -> str:
    """Turn another library's checkpoint into an SAE folder.

    Args:
        checkpoint: A published VL-SAE ``.pth`` file.
        out: Folder to write.
        k: Latents kept a row; needed where the file name does not say it.
        strict: Keep rule of the published code, which differs for ties only.

    Returns:
        The folder.
    """
    sae = load(checkpoint, k, strict)
    with disk_errors(out):
        return str(sae.save_pretrained(out, {"converted_from": Path(checkpoint).name}))
