"""``attributes.json``: what ``mmsae attributes`` found, as the browser reads it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mmsae.files import read_text, write_json
from mmsae.steering.methods.attributes import Attribute
from mmsae.types import InputError

FILE = "attributes.json"


def write_attributes(path: str | Path, found: Mapping[int, Iterable[Attribute]], sae: str, **more: Any) -> Path:
    """Write what :func:`mmsae.steering.methods.attributes.discover` and ``confirm`` found of features.

    Args:
        path: The file.
        found: ``{latent: attributes}``; none where no word stood out.
        sae: Fingerprint of the SAE.
        **more: What else the file says: ``job``, ``rates``.
    """

    def plain(a: Attribute) -> dict[str, Any]:
        choice = a.choice and {k: None if v != v else v for k, v in a.choice._asdict().items()}  # NaN is no JSON
        return a._asdict() | {"choice": choice}

    latents = {str(j): [plain(a) for a in x] for j, x in found.items()}
    return write_json(path, {"format": 1, "sae": sae, "latents": latents, **more})


def read_attributes(path: str | Path, sae: str) -> dict[str, Any]:
    """``latents`` and, where the command wrote them, ``rates`` of a file, or of the folder in which it lies.

    Raises:
        InputError: Another file, or another SAE.
    """
    path = Path(path) / FILE if Path(path).is_dir() else Path(path)
    try:
        said = json.loads(read_text(path))
        own, latents = said["sae"], said["latents"]
    except (ValueError, KeyError, TypeError) as e:
        if isinstance(e, InputError):
            raise
        raise InputError(f"{path} holds no attributes: it should be a JSON object with format, sae and latents") from e
    if own != sae:
        raise InputError(f"{path} has attributes of SAE {str(own)[:12]}, and the evidence is of {sae[:12]}")
    return {"latents": latents, "rates": said.get("rates")}
