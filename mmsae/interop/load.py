"""Reading another library's checkpoint."""

from __future__ import annotations

from pathlib import Path

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
