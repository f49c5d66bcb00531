"""``mmsae convert``: another library's checkpoint as an SAE folder."""

from __future__ import annotations

from pathlib import Path

from mmsae.files import disk_errors


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
    from mmsae.interop.vlsae import load

    sae = load(checkpoint, k, strict)
    with disk_errors(out):
        return str(sae.save_pretrained(out, {"converted_from": Path(checkpoint).name}))
