"""``mmsae convert``: another library's checkpoint as an SAE folder, and back."""

from __future__ import annotations

from pathlib import Path

from mmsae.files import disk_errors
from mmsae.types import InputError


def convert(
    src: str | None = None,
    dst: str | None = None,
    to: str = "mmsae",
    subfolder: str | None = None,
    revision: str | None = None,
    modality: str | None = None,
    k: int | None = None,
    threshold: float | None = None,
    norm_scaling_factor: float | None = None,
    strict: bool = False,
    checkpoint: str | None = None,
    out: str | None = None,
) -> str:
    """Turn the SAE of one library into one of another.

    Args:
        src: Folder, file or Hugging Face hub id of any library that mmsae reads, or of mmsae.
        dst: Folder to write.
        to: Library to write for: mmsae, saelens, dictionary_learning, sparsify, overcomplete, visaebench, saev, vlsae.
        subfolder: Folder or file within SRC.
        revision: Branch, tag or commit of a hub id.
        modality: Name for the modality of an SAE whose files do not name it (default: image); or which one to write, of
            an SAE that has several.
        k: Latents kept a row, where the files do not say it (overcomplete, VL-SAE under another file name).
        threshold: Pre-code above which latents fire, where the files lack it (BatchTopKSAE of overcomplete, SAeUron).
        norm_scaling_factor: Factor of the activations that SAELens did not fold into the weights.
        strict: Keep rule of the published VL-SAE code, which differs for ties only.
        checkpoint: The same as SRC.
        out: The same as DST.

    Returns:
        The folder.

    Raises:
        InputError: What cannot be read, or what the other library has no such model for.
    """
    from mmsae.interop.detect import LIBRARIES, load, locate, module
    from mmsae.sae.foreign import library_of

    src, dst = _one("SRC", src, "--checkpoint", checkpoint), _one("DST", dst, "--out", out)
    if to not in ("mmsae", *LIBRARIES):
        raise InputError(f"to must be one of mmsae, {', '.join(LIBRARIES)}, not {to!r}")
    place = locate(src, subfolder, revision)
    hints = {"k": k, "threshold": threshold, "norm_scaling_factor": norm_scaling_factor, "strict": strict or None}
    named = library_of(place) not in ("mmsae", "vlsae", None)  # by their files
    sae = load(place, modality=modality if named else None, **hints)
    if not named and modality is not None and to == "mmsae":
        raise InputError(f"the modalities of {src} are named: {', '.join(sae.modalities)}; modality has no effect")
    with disk_errors(dst):
        if to != "mmsae":
            return str(module(to).write(sae, dst, None if named else modality))
        source = Path(src).name + (f"/{subfolder}" if subfolder else "")
        return str(sae.save_pretrained(dst, {"converted_from": source}))


def _one(name: str, given: str | None, option: str, other: str | None) -> str:
    if (given is None) == (other is None):
        raise InputError(f"give {name} or {option}: {'neither is' if given is None else 'both are'} given")
    return given if other is None else other
