"""The SAE folder: ``cfg.json`` + ``sae_weights.safetensors`` + ``mmsae_state.safetensors`` + a model card.

Tensor names are SAELens's (``W_enc (d_in, d_sae)``, ``b_enc``, ``W_dec (d_sae, d_in)``, ``b_dec``); several
dictionaries or encoders carry the modality as suffix (``W_dec.image``). A one-modality TopK SAE without normaliser is a
valid SAELens folder; all others use an architecture name that SAELens refuses, since it could not reproduce the model.
What only mmsae reads (statistics of the normaliser, k) has a file of its own: SAELens refuses tensors it does not know.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmsae import __version__
from mmsae.files import atomic_folder, refuse_foreign
from mmsae.sae.encoder import AffineEncoder, PerModalityEncoder
from mmsae.sae.registry import composition, make_part
from mmsae.sae.sae import SAE
from mmsae.types import InputError, Site

FORMAT = 2  # 1 had everything in one file of tensors
CFG, WEIGHTS, STATE = "cfg.json", "sae_weights.safetensors", "mmsae_state.safetensors"


def _slots(sae: SAE) -> dict[str, tuple[nn.Module, str, bool]]:
    """``{name in the file: (module, parameter name, stored transposed)}`` of all weights."""
    encoders = {"": sae.encoder}
    if isinstance(sae.encoder, PerModalityEncoder):
        encoders = {f".{m}": e for m, e in sae.encoder.encoders.items()}
    slots: dict[str, tuple[nn.Module, str, bool]] = {}
    for suffix, enc in encoders.items():
        slots["W_enc" + suffix] = (enc, "weight", True)
        if getattr(enc, "bias", None) is not None:
            slots["b_enc" + suffix] = (enc, "bias", False)
    for key, dictionary in sae.dictionaries.items():
        suffix = "" if key == "shared" else f".{key}"
        slots["W_dec" + suffix] = (dictionary, "weight", False)
        if dictionary.bias is not None:
            slots["b_dec" + suffix] = (dictionary, "bias", False)
    return slots


def _buffers(sae: SAE) -> dict[str, Tensor]:
    """Buffers that change results, by their names in the file."""
    parts = {"normaliser": sae.normaliser, "selector": sae.selector}
    return {f"{p}.{name}": b for p, part in parts.items() for name, b in part.named_buffers()}


def saelens_fields(sae: SAE) -> dict[str, Any]:
    """Top-level fields of ``cfg.json``: a SAELens TopK config where that is the same model, else a refused name."""
    n = sae.normaliser.config()
    plain = (
        len(sae.modalities) == 1
        and isinstance(sae.encoder, AffineEncoder)
        and sae.encoder.use_bias
        and sae.selector.name == "topk"
        and "shared" in sae.dictionaries
        and sae.dictionaries["shared"].use_bias
        and not (n["unit_in"] or n["centre"] or n["unit_out"] or n["scale"] != "none")
    )
    fields: dict[str, Any] = {
        "architecture": "topk" if plain else "mmsae",
        "d_in": max(sae.d_in.values()),
        "d_sae": sae.d_sae,
        "dtype": "float32",
        "device": "cpu",
    }
    if plain:
        fields |= {
            "k": sae.selector.k,
            "apply_b_dec_to_input": sae.encoder.subtract_decoder_bias,
            "normalize_activations": "none",
            "reshape_activations": "none",
            "rescale_acts_by_decoder_norm": False,
            "metadata": {},
        }
    return fields


def config(sae: SAE, training: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Contents of ``cfg.json``."""
    return saelens_fields(sae) | {
        "mmsae": {
            "format": FORMAT,
            "version": __version__,
            **composition(sae),
            "sites": {m: s.to_dict() for m, s in sae.sites.items()},
            "training": dict(training or {}),
        }
    }


def save(sae: SAE, folder: str | Path, training: Mapping[str, Any] | None = None) -> Path:
    """Write the folder; an existing one is replaced as a whole.

    Args:
        sae: A built SAE.
        folder: Where to.
        training: JSON-able facts about the training data and run, kept in ``cfg.json``.

    Raises:
        InputError: The folder holds something else, which would be lost.
    """
    refuse_foreign(folder, CFG)
    tensors = {}
    for name, (module, attribute, transposed) in _slots(sae).items():
        value = getattr(module, attribute).detach().cpu()
        tensors[name] = (value.t() if transposed else value).contiguous()
    state = {name: b.detach().cpu().clone() for name, b in _buffers(sae).items()}
    cfg = config(sae, training)
    with atomic_folder(folder) as temp:
        save_file(tensors, temp / WEIGHTS, metadata={"format": "pt"})
        save_file(state, temp / STATE, metadata={"format": "pt"})
        (temp / CFG).write_text(json.dumps(cfg, indent=2) + "\n")
        (temp / "README.md").write_text(model_card(cfg))
    return Path(folder)


def _locate(path: str | Path) -> Path:
    folder = Path(path)
    if folder.is_dir():
        return folder
    if folder.exists() or str(path).startswith((".", "/", "~")) or str(path).count("/") != 1:
        raise InputError(f"no SAE at {path}: expected a folder with {CFG}, or a hub id like user/name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(path), allow_patterns=[CFG, WEIGHTS, STATE]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as e:
        raise InputError(
            f"no SAE at {path}: neither a folder here nor reachable on the hub ({type(e).__name__})"
        ) from e


def load(path: str | Path, device: str = "cpu") -> SAE:
    """Load a folder or a hub id.

    Raises:
        InputError: No SAE there, a newer format, an unknown part, or tensors that do not fit the config.
    """
    folder = _locate(path)
    try:
        cfg = json.loads((folder / CFG).read_text())
    except FileNotFoundError as e:
        raise InputError(f"no {CFG} in {folder}: this is not an SAE folder") from e
    except ValueError as e:
        raise InputError(f"{folder / CFG} is not valid JSON: {e}") from e
    if not isinstance(cfg, dict) or "mmsae" not in cfg:
        name = cfg.get("architecture") if isinstance(cfg, dict) else None
        raise InputError(f"{folder / CFG} was written by another library (architecture {name!r})")
    try:
        sae = _rebuild(cfg["mmsae"], folder / CFG)
    except (KeyError, TypeError, AttributeError) as e:
        raise InputError(f"{folder / CFG} is not what mmsae writes: {type(e).__name__} {e}") from e
    tensors = _tensors(folder, WEIGHTS)
    if cfg["mmsae"]["format"] > 1:
        tensors |= _tensors(folder, STATE)
    _fill(sae, tensors, folder / WEIGHTS)
    return sae.to(device).eval().requires_grad_(False)


def _tensors(folder: Path, name: str) -> dict[str, Tensor]:
    try:
        return load_file(folder / name)
    except FileNotFoundError as e:
        raise InputError(f"no {name} in {folder}: the SAE's weights are missing") from e
    except SafetensorError as e:
        raise InputError(f"{folder / name} is damaged: {e}") from e


def _rebuild(block: Mapping[str, Any], file: Path) -> SAE:
    """The SAE that the ``mmsae`` block of ``cfg.json`` describes, weights still random."""
    if block["format"] > FORMAT:
        raise InputError(
            f"{file} has format {block['format']}, written by mmsae {block.get('version')}; "
            f"this version reads up to {FORMAT}: upgrade mmsae"
        )
    sae = SAE(
        modalities=block["modalities"],
        normaliser=make_part("normaliser", block["normaliser"]),
        encoder=make_part("encoder", block["encoder"]),
        selector=make_part("selector", block["selector"]),
        dictionaries={k: make_part("dictionary", d) for k, d in block["dictionaries"].items()},
    )
    with torch.random.fork_rng(devices=[]):  # the initial weights are overwritten: loading draws nothing
        sae.build(block["d_in"], block["d_sae"])
    sae.sites = {m: Site(**s) for m, s in block["sites"].items()}
    return sae


@torch.no_grad()
def _fill(sae: SAE, tensors: dict[str, Tensor], file: Path) -> None:
    targets = {n: (getattr(mod, a), tr) for n, (mod, a, tr) in _slots(sae).items()}
    targets |= {n: (b, False) for n, b in _buffers(sae).items()}
    if set(targets) != set(tensors):
        odd = sorted(set(targets) ^ set(tensors))
        raise InputError(f"{file} and {CFG} disagree about tensors {odd}")
    for name, (target, transposed) in targets.items():
        value = tensors[name].t() if transposed else tensors[name]
        if value.shape != target.shape:
            raise InputError(f"{name} in {file} has shape {tuple(value.shape)}, {CFG} says {tuple(target.shape)}")
        target.copy_(value)
    if hasattr(sae.selector, "set_k"):
        sae.selector.set_k(int(sae.selector.k_))
    sae.fresh = False


def push(sae: SAE, repo_id: str, private: bool = False, token: str | None = None) -> str:
    """Upload the folder to the Hugging Face hub; returns the repository's address."""
    import tempfile

    from huggingface_hub import HfApi

    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as temp:
        folder = save(sae, Path(temp) / "sae")
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=str(folder), commit_message="Upload SAE")
    return str(url)


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
