"""The model card of an SAE folder (README.md): what it reads, of what parts, how to load it, and what was measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

CARD = "README.md"
PLACE = "THIS_REPOSITORY_OR_FOLDER"
OWN = "<!-- mmsae push writes this card anew; without this line it leaves your text as it is -->"
"""The line by which a card is known as written by mmsae; those of older versions say ``PLACE``."""


def is_own(text: str) -> bool:
    """Whether a card is as mmsae wrote it, so that a newer one may take its place."""
    return OWN in text or PLACE in text


def model_card(cfg: Mapping[str, Any], place: str = PLACE, evaluation: str = "", licence: str = "") -> str:
    """README.md of an SAE folder.

    Args:
        cfg: Contents of its ``cfg.json``.
        place: What loads it.
        evaluation: The section on what was measured.
        licence: Identifier of a licence as the hub has them, such as ``apache-2.0``.
    """
    block, quoted = cfg["mmsae"], json.dumps(place)
    modalities, first = block["modalities"], block["modalities"][0]
    sites = "\n".join(
        f"| {m} | `{s['module']}` | {s['io']} | {s['tokens']} | {s['width']} | `{s['hint'] or 'not named'}` | "
        f"`{s['host']}` |"
        for m, s in block["sites"].items()
    )
    head = "| modality | module | io | tokens | width | host | fingerprint |\n|---|---|---|---|---|---|---|"
    parts = "\n".join(f"- {slot}: `{json.dumps(block[slot])}`" for slot in _PARTS)
    training = "\n".join(f"- {k}: {_shown(v)}" for k, v in block["training"].items()) or "Not recorded."
    return f"""{metadata(block, licence)}
{OWN}

# Sparse autoencoder, {block["d_sae"]:,} latents over {" and ".join(modalities)}

```python
from mmsae import SAE
sae = SAE.from_pretrained({quoted})
codes = sae.encode(x, modality="{first}")  # x (N, {block["d_in"][first]}): raw activations
```

`sae.decode(codes, modality="{first}")` gives them back; `mmsae.load_pair({quoted})` loads the host with it.

## Where the activations come from

{f"{head}{chr(10)}{sites}" if sites else "Not named yet."}

## Parts

{parts}

## Training

{training}

## Evaluation

{evaluation or "No evaluation was given with this SAE; `mmsae evaluate` makes one, with controls."}

## Licence

{licence or "None is named: ask who made this SAE before you use it."}

A latent is a direction that was useful for reconstruction, not a verified concept: look at what it fires on before
giving it a name, and compare with a random SAE of equal size before trusting a number.
"""


def metadata(block: Mapping[str, Any], licence: str = "") -> str:
    """The YAML block that the hub reads, between its lines of dashes."""
    import yaml

    said: dict[str, Any] = {"library_name": "mmsae"} | ({"license": licence} if licence else {})
    said["tags"] = ["sparse-autoencoder", "interpretability", *block["modalities"]]
    hosts = {s.get("hint") or "" for s in block["sites"].values()}
    if bases := sorted(h.removeprefix("hf-hub:").split("?")[0] for h in hosts if h.startswith("hf-hub:")):
        said["base_model"] = bases
    return f"---\n{yaml.safe_dump(said, sort_keys=False, allow_unicode=True)}---"


_PARTS = ("normaliser", "encoder", "selector", "dictionaries")


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_shown(v)}" for k, v in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)
