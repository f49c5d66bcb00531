"""The SAE folder: ``cfg.json`` + ``sae_weights.safetensors`` + ``mmsae_state.safetensors`` + a model card.

Tensor names are SAELens's (``W_enc (d_in, d_sae)``, ``b_enc``, ``W_dec (d_sae, d_in)``, ``b_dec``); several
dictionaries or encoders carry the modality as suffix (``W_dec.image``). An SAE of which SAELens has
the same model (:mod:`mmsae.sae.saelens_fields`) is a valid SAELens folder; all others use an architecture name that
SAELens refuses, since it could not reproduce the model.
What only mmsae reads (statistics of the normaliser, k) has a file of its own: SAELens refuses tensors it does not know.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mmsae.files import atomic_folder, refuse_foreign
from mmsae.kernels.precision import PRECISIONS
from mmsae.sae.foreign import library_of
from mmsae.types import InputError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
FORMAT = 2  # 1 had everything in one file of tensors
CFG, WEIGHTS, STATE = "cfg.json", "sae_weights.safetensors", "mmsae_state.safetensors"
DERIVED = ("threshold",)  # tensors that only SAELens needs: they follow from the state that mmsae reads


def write(folder: str | Path, cfg: dict[str, Any], weights: dict[str, Tensor], state: dict[str, Tensor]) -> Path:
    """Write the folder; an existing one is replaced as a whole.

    ``weights`` have SAELens's names and layout, ``state`` are buffers that change results.

    Raises:
        InputError: The folder holds something else, which would be lost.
    """
    from safetensors.torch import save_file

    refuse_foreign(folder, CFG)
    with atomic_folder(folder) as temp:
        save_file(weights, temp / WEIGHTS, metadata={"format": "pt"})
        save_file(state, temp / STATE, metadata={"format": "pt"})
        (temp / CFG).write_text(json.dumps(cfg, indent=2) + "\n")
        (temp / "README.md").write_text(model_card(cfg))
    return Path(folder)


def _locate(path: str | Path) -> Path:
    folder = Path(path)
    if folder.is_dir():
        return folder
    if folder.is_file() and (hint := _read_by(folder, path)):
        raise InputError(f"{path} is a file, not an SAE folder{hint}")
    if folder.exists() or str(path).startswith((".", "/", "~")) or str(path).count("/") != 1:
        raise InputError(f"no SAE at {path}: expected a folder with {CFG}, or a hub id like user/name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(path), allow_patterns=[CFG, WEIGHTS, STATE]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as e:
        why = f"neither a folder here nor reachable on the hub ({type(e).__name__})"
        raise InputError(f"no SAE at {path}: {why}") from e


def _read_by(place: Path, path: str | Path) -> str:
    """What to do with the checkpoint of another library that is at ``place``; empty where none is."""
    try:
        name = library_of(place)
    except InputError:  # a file of weights that cannot be looked into; what is wrong with the folder is said already
        return ""
    return f"; it is a checkpoint of {name}: mmsae convert {path} DST makes an SAE folder of it" if name else ""


def read_config(path: str | Path) -> tuple[Path, dict[str, Any]]:
    """The folder of a path or hub id, and what its ``cfg.json`` says to mmsae.

    Raises:
        InputError: No SAE there, another library's, or a newer format.
    """
    folder = _locate(path)
    file = folder / CFG
    try:
        cfg = json.loads(file.read_text())
    except FileNotFoundError as e:
        raise InputError(f"no {CFG} in {folder}: this is not an SAE folder{_read_by(folder, path)}") from e
    except ValueError as e:
        raise InputError(f"{file} is not valid JSON: {e}") from e
    if not isinstance(cfg, dict) or "mmsae" not in cfg:
        name = cfg.get("architecture") if isinstance(cfg, dict) else None
        raise InputError(f"{file} was written by another library (architecture {name!r}){_read_by(folder, path)}")
    block = cfg["mmsae"]
    if isinstance(block, dict) and isinstance(block.get("format"), int) and block["format"] > FORMAT:
        raise InputError(
            f"{file} has format {block['format']}, written by mmsae {block.get('version')}; "
            f"this version reads up to {FORMAT}: upgrade mmsae"
        )
    if odd := _oddity(block):
        raise InputError(f"{file} is not what mmsae writes: {odd}")
    return folder, block


_PART = {"normaliser": dict, "encoder": dict, "selector": dict, "dictionaries": dict}
_KINDS = {"format": int, "modalities": list, "d_in": (dict, int), "d_sae": int, "sites": dict, **_PART}
_SITE = {"host", "module", "io", "tokens", "modality", "width", "hint"}


def _oddity(block: Any) -> str:
    """What is wrong with the form of the ``mmsae`` block; empty where nothing is."""
    if not isinstance(block, dict):
        return f"its block mmsae is {block!r:.40}"
    if wrong := [f for f, kind in _KINDS.items() if not isinstance(block.get(f), kind)]:
        return f"{wrong[0]} is {block.get(wrong[0])!r:.40}"
    if block.get("precision") not in (None, *PRECISIONS):
        return f"precision is {block['precision']!r:.40}"
    sites = block["sites"].items()
    odd = [(m, s) for m, s in sites if not isinstance(s, dict) or not {"host", "module"} <= s.keys() <= _SITE]
    return f"the site of {odd[0][0]} is {odd[0][1]!r:.80}" if odd else ""


def read_tensors(folder: Path, block: Mapping[str, Any]) -> dict[str, Tensor]:
    """Weights and state of a folder that :func:`read_config` found."""
    from safetensors.torch import load_file

    files = (WEIGHTS, STATE) if block["format"] > 1 else (WEIGHTS,)
    found = {name: t for file in files for name, t in _read(folder, file, load_file).items()}
    return {name: t for name, t in found.items() if name not in DERIVED}


def count_parameters(folder: Path, block: Mapping[str, Any]) -> int:
    """Number of weights of a folder that :func:`read_config` found, which are not read."""
    from safetensors import safe_open

    def count(file: Path) -> int:
        with safe_open(file, "np") as tensors:
            shapes = {n: tensors.get_slice(n).get_shape() for n in tensors.keys()}
        state = ("normaliser.", "selector.")  # which format 1 has in the same file
        return sum(math.prod(s) for n, s in shapes.items() if not n.startswith(state) and n not in DERIVED)

    return _read(folder, WEIGHTS, count)


def _read(folder: Path, name: str, read: Callable[[Path], T]) -> T:
    from safetensors import SafetensorError

    try:
        return read(folder / name)
    except FileNotFoundError as e:
        raise InputError(f"no {name} in {folder}: the SAE's weights are missing") from e
    except SafetensorError as e:
        raise InputError(f"{folder / name} is damaged: {e}") from e


def push(save: Callable[[Path], Path], repo_id: str, private: bool = False, token: str | None = None) -> str:
    """Upload the folder that ``save`` writes to the Hugging Face hub; returns the repository's address."""
    import tempfile

    from huggingface_hub import HfApi

    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as temp:
        folder = save(Path(temp) / "sae")
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
    head = "| modality | module | io | tokens | width | host |\n|---|---|---|---|---|---|"
    table = f"{head}\n{sites}" if sites else "Not named yet."
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
