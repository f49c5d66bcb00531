"""Names of latents, and how well they were found to hold: the file ``names.json`` that everything reads and writes.

::

    {"format": 1, "sae": FINGERPRINT, "names": {"12": {"name": "red circle", "method": "wpmi", "score": 1.9,
     "margin": 0.4, "z": 5.2, "auroc": 0.97, "by": "ViT-B-32/openai", "note": ""}}}

A latent whose ``name`` is null was looked at and got none; its figures say why. The older form ``{"12": "red
circle"}``, which names no SAE and has no figures, is read too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mmsae.files import read_text, write_json
from mmsae.types import InputError

FORMAT, FILE = 1, "names.json"
#: How a name was found: by a text encoder's words (``vocabulary``: nearest to the atom; ``centroid``: to the mean
#: image; ``wpmi``: CLIP-Dissect), by words of captions, by a vision-language model that saw the evidence (``lvlm``), by
#: one that saw the latent injected (``steering``), by a ``person``.
METHODS = ("vocabulary", "centroid", "wpmi", "captions", "lvlm", "steering", "person")
FIGURES = ("score", "margin", "z", "auroc")


class LatentName(NamedTuple):
    """The name of one latent; figures that nobody measured are NaN."""

    name: str | None  #: What it is called; None where nothing held up
    method: str = "person"  #: One of :data:`METHODS`
    score: float = math.nan  #: What the method ranks phrases by
    margin: float = math.nan  #: How far the score is above the runner-up's
    z: float = math.nan  #: The score among the same phrase's scores over all latents, in standard deviations
    auroc: float = math.nan  #: How well the name tells items on which the latent fires from others, on unseen items
    by: str = ""  #: Which host, model or person
    note: str = ""  #: What else there is to say: why there is no name, say

    def provenance(self) -> str:
        """``wpmi, AUROC 0.97, z 5.2, by ViT-B-32/openai``: how it was found, how well it holds and who says so."""
        figures = [f"AUROC {self.auroc:.2f}", f"z {self.z:.1f}"]
        said = [text for text, v in zip(figures, (self.auroc, self.z), strict=True) if not math.isnan(v)]
        return ", ".join([self.method, *said, *([f"by {self.by}"] if self.by not in ("", self.method) else [])])

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; NaN is null."""
        said = self._asdict()
        return said | {k: None if math.isnan(said[k]) else said[k] for k in FIGURES}


def names_only(names: Mapping[int, LatentName]) -> dict[int, str]:
    """``{latent: name}`` of the latents that have one."""
    return {j: n.name for j, n in names.items() if n.name}


def names_beside(sae: str | Path) -> Path | None:
    """The names in the evidence beside an SAE's folder (``sae`` and ``evidence/names`` in one folder), or None."""
    path = Path(sae).resolve().parent / "evidence" / "names" / FILE
    return path if path.is_file() else None


def write_names(path: str | Path, names: Mapping[int, LatentName], sae: str) -> Path:
    """Write names of an SAE, by its fingerprint, and return the path."""
    said = {str(j): names[j].to_dict() for j in sorted(names)}
    return write_json(path, {"format": FORMAT, "sae": sae, "names": said})


def read_names(path: str | Path | None, sae: str = "") -> dict[int, LatentName]:
    """``{latent: name}`` of a file, or of none.

    Args:
        path: What :func:`write_names` wrote, or ``{latent: name}``; None: there are no names.
        sae: Fingerprint of the SAE that they must be of; empty: any. The older form fits any.

    Raises:
        InputError: No such file, another format, or names of another SAE.
    """
    if path is None:
        return {}
    try:
        found = json.loads(read_text(path))
    except ValueError as e:
        if isinstance(e, InputError):
            raise
        raise InputError(f"names {path} is not a JSON object of latent: name: {e}") from e
    if not isinstance(found, dict):
        raise InputError(f"names {path} is not a JSON object of latent: name, but a {type(found).__name__}")
    names = found
    if isinstance(found.get("names"), dict):
        if found.get("format", FORMAT) > FORMAT:
            raise InputError(f"{path} has names of format {found['format']}; this version reads up to {FORMAT}")
        if sae and found.get("sae") and sae != found["sae"]:
            raise InputError(f"{path} names latents of SAE {str(found['sae'])[:12]}, not of {sae[:12]}")
        names = found["names"]
    return dict(_read(path, j, said) for j, said in names.items())


def _read(path: str | Path, latent: str, said: Any) -> tuple[int, LatentName]:
    try:
        j = int(latent)
        if said is None or isinstance(said, str):
            return j, LatentName(said or None)
        known = {k: said[k] for k in LatentName._fields if k in said}
        figures = {k: math.nan if known[k] is None else float(known[k]) for k in FIGURES if k in known}
        texts = {k: str(known[k]) for k in ("method", "by", "note") if k in known}
        name = None if not known["name"] else str(known["name"])
    except (ValueError, TypeError, KeyError) as e:
        raise InputError(
            f"names {path} is not a JSON object of latent: name, for latent {latent!r} it has {said!r}"
        ) from e
    return j, LatentName(name, **texts, **figures)
