"""The model card that is saved beside every SAE."""

from __future__ import annotations

from typing import Any


def model_card(cfg: dict[str, Any]) -> str:
    """README.md of an SAE folder, from the contents of its ``cfg.json``."""
    block = cfg["mmsae"]
    modalities = block["modalities"]
    sites = "\n".join(
        f"| {m} | `{s['module']}` | {s['io']} | {s['tokens']} | {s['width']} | `{s['hint'] or s['host'][:12]}` |"
        for m, s in block["sites"].items()
    )
    table = (
        f"| modality | module | io | tokens | width | host |\n|---|---|---|---|---|---|\n{sites}"
        if sites
        else "Not named yet."
    )
    training = "\n".join(f"- {k}: {v}" for k, v in block["training"].items()) or "Not recorded."
    parts = "\n".join(f"- {slot}: `{block[slot]}`" for slot in ("normaliser", "encoder", "selector"))
    return f"""---
library_name: mmsae
tags: [sparse-autoencoder, interpretability, {", ".join(modalities)}]
---
# Sparse autoencoder, {block["d_sae"]} latents over {" and ".join(modalities)}

```python
from mmsae import SAE
sae = SAE.from_pretrained("THIS_REPOSITORY_OR_FOLDER")
codes = sae.encode(x, modality="{modalities[0]}")   # x (N, {block["d_in"][modalities[0]]}) raw activations
x_hat = sae.decode(codes, modality="{modalities[0]}")
```

## Where the activations come from

{table}

## Parts

{parts}
- dictionaries: `{block["dictionaries"]}`

## Training

{training}

A latent is a direction that was useful for reconstruction, not a verified concept: look at what it fires on before
giving it a name, and compare with a random SAE of equal size before trusting a number.
"""
