"""What steering showed of latents: strips of pictures at several strengths."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmsae.files import read_text
from mmsae.interpret.browser.files import put
from mmsae.types import InputError

PIXELS = 128
UNSTEERED = "none"  # the name under which mmsae steer keeps what is drawn without steering


def write_strips(folder: Path, runs: Sequence[str], sae: str) -> dict[int, list[str]]:
    """Write the pictures of runs of ``mmsae steer``, and return the keys of the files of each latent.

    Args:
        folder: ``data`` of the browser.
        runs: Folders of runs that edit features.
        sae: Fingerprint of the SAE that they must be of.

    Raises:
        InputError: No run of steering, one without features, or of another SAE.
    """
    out: dict[int, list[str]] = {}
    for i, run in enumerate(runs):
        results = Path(run) / "results.json"
        if not results.exists():
            raise InputError(f"{run} is no run of mmsae steer: it has no results.json")
        try:
            said = json.loads(read_text(results))
            job, name = said["job"], said["name"]
            own, features, prompts, unit = job["sae"], job["how"]["features"], job["prompts"], job["gates"]["unit"]
        except (ValueError, KeyError, TypeError) as e:
            if isinstance(e, InputError):
                raise
            raise InputError(f"{results} is no result of mmsae steer that this version reads: {e!r}") from e
        if own != sae:
            raise InputError(f"{run} steers with SAE {own[:12]}, and the evidence is of {sae[:12]}")
        if not features:
            raise InputError(f"{run} steers no features of its own: it shows nothing of a latent")
        put(folder, f"strips/{i}", {"name": name, "unit": unit, **_strip(Path(run), name, prompts)})
        for j in features:
            out.setdefault(int(j), []).append(f"strips/{i}")
    return out


def _strip(run: Path, name: str, prompts: Sequence[str]) -> dict[str, Any]:
    """``strengths`` and ``rows`` of pictures, of the intervention and of its first control."""
    from mmsae.interpret.evidence.folder import map_arrays

    images: dict[tuple[str, int], dict[float, np.ndarray]] = {}
    plain: dict[str, np.ndarray] = {}
    for part in sorted((run / "parts").glob("*.safetensors")):
        for key, pixels in map_arrays(part).items():
            if key == "none":
                continue
            intervention, strength, control, prompt, _ = json.loads(key)
            if intervention == UNSTEERED:
                plain[prompt] = pixels
            elif intervention == name and control <= 0:
                images.setdefault((prompt, control), {})[strength] = pixels
    order = {prompt: i for i, prompt in reversed(list(enumerate(prompts)))}
    strengths = sorted({0.0, *(s for own in images.values() for s in own)})
    rows = [
        {"prompt": prompt, "control": control == 0,
         "images": [_webp(plain.get(prompt) if s == 0 else own.get(s)) for s in strengths]}
        for (prompt, control), own in sorted(images.items(), key=lambda x: (order[x[0][0]], x[0][1]))
    ]  # fmt: skip
    return {"strengths": strengths, "rows": rows}


def _webp(pixels: np.ndarray | None) -> str:
    """``(3, H, W) uint8`` as a data URI; empty for none."""
    from PIL import Image

    if pixels is None:
        return ""
    image, buffer = Image.fromarray(np.ascontiguousarray(np.asarray(pixels).transpose(1, 2, 0))), io.BytesIO()
    image.thumbnail((PIXELS, PIXELS))
    image.save(buffer, "webp", quality=85)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
