"""How the folder format1 was made, with the code of version 0.1.0 at commit 77d1d96; kept to be read.

Run there, in this folder: ``PYTHONPATH=../../.. python make_format1.py``. It was the last commit that wrote SAE folders
of format 1, with the normaliser's statistics among the weights.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file

from mmsae.sae import SAE, Dictionary, Normaliser, TopK
from mmsae.types import Site

MAKE = {
    "paired": {
        "normaliser": Normaliser(unit_in=True, centre=True, unit_out=True),
        "dictionaries": {m: Dictionary() for m in ("image", "text")},
    },
    "plain": {"modalities": ["image"]},
}

out, expected = Path("format1"), {}
for seed, (name, parts) in enumerate(MAKE.items()):
    torch.manual_seed(seed)
    sae = SAE(8, 24, selector=TopK(4), **parts)
    rows = {m: torch.randn(64, 8) + 1 for m in sae.modalities}
    sae.fit_normaliser(rows)
    with torch.no_grad():
        for p in sae.parameters():
            p.add_(0.1 * torch.randn_like(p))
    sae.sites = {m: Site("ab" * 16, f"{m}.embed", modality=m, width=8, hint="local-dir:clip") for m in sae.modalities}
    sae.save_pretrained(out / name, {"steps": 0})
    for m in sae.modalities:
        codes = sae.encode(rows[m], m)
        expected |= {f"{name}/{m}/x": rows[m], f"{name}/{m}/codes": codes.to_dense().detach()}
        expected[f"{name}/{m}/x_hat"] = sae.decode(codes, m).detach()
save_file(expected, out / "expected.safetensors")
