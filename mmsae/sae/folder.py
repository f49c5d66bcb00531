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
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmsae.files import atomic_folder, refuse_foreign
from mmsae.kernels.precision import PRECISIONS
from mmsae.remote import hub
from mmsae.remote.folders import brought_folder
from mmsae.remote.hub import HubPlace, hub_place
from mmsae.remote.urls import is_url
from mmsae.sae import tensor_file
from mmsae.sae.card import CARD, is_own, model_card
from mmsae.sae.foreign import library_of
from mmsae.sae.tensor_file import StoredTensor
from mmsae.types import InputError

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 2  # 1 had everything in one file of tensors
CFG, WEIGHTS, STATE = "cfg.json", "sae_weights.safetensors", "mmsae_state.safetensors"
RESULTS = "results.json"  # of mmsae evaluate, where the folder has one
DERIVED = ("threshold",)  # tensors that only SAELens needs: they follow from the state that mmsae reads


def write(
    folder: str | Path, cfg: dict[str, Any], weights: dict[str, tuple[Tensor, bool]], state: dict[str, Tensor]
) -> Path:
    """Write the folder; an existing one is replaced as a whole.

    ``weights`` are ``{SAELens's name: (tensor, whether its layout is the transposed one)}``, ``state`` are buffers that
    change results.

    Raises:
        InputError: The folder holds something else, which would be lost.
    """
    refuse_foreign(folder, CFG)
    about = header_of(cfg)
    with atomic_folder(folder) as temp:
        tensor_file.write(temp / WEIGHTS, weights, about)
        tensor_file.write(temp / STATE, {name: (t, False) for name, t in state.items()}, about)
        (temp / CFG).write_text(json.dumps(cfg, indent=2) + "\n")
        (temp / CARD).write_text(model_card(cfg), encoding="utf-8")
    return Path(folder)


def header_of(cfg: Mapping[str, Any]) -> dict[str, str]:
    """What the header of a file of tensors says of the SAE, for who has this file alone."""
    own = {n: str(cfg["mmsae"][n]) for n in ("version", "d_sae")}
    width = json.dumps(cfg["mmsae"]["d_in"])
    return {"format": "pt", "architecture": cfg["architecture"], "d_in": width, "d_sae": own["d_sae"],
            "mmsae": own["version"], "mmsae_format": str(cfg["mmsae"]["format"])}  # fmt: skip


def _locate(path: str | Path, revision: str | None, subfolder: str | None) -> Path:
    folder = Path(path)
    if folder.is_dir():
        return folder / (subfolder or "")
    if folder.is_file() and (hint := _read_by(folder, path)):
        raise InputError(f"{path} is a file, not an SAE folder{hint}")
    place = None if folder.exists() else hub_place(str(path), revision, subfolder)
    if place is not None:
        return _of_hub(place, str(path))
    if isinstance(path, str) and is_url(path):
        return brought_folder(f"{path.rstrip('/')}/{subfolder or ''}", (CFG, WEIGHTS), (STATE,))
    raise InputError(
        f"no SAE at {path}: expected a folder with {CFG}, a hub id like user/name or user/name@revision/folder, or the "
        "URL of a folder"
    )


def _of_hub(place: HubPlace, path: str) -> Path:
    try:
        folder = hub.brought(place, (CFG, WEIGHTS, STATE))
    except InputError as e:
        raise InputError(
            f"no SAE at {path}: " + ("" if "://" in path else "it is no folder here, and ") + str(e)
        ) from e
    if not (folder / CFG).is_file():
        raise InputError(f"{place.repo} has no {CFG} in {place.folder or 'its main folder'}{folders_of(place)}")
    return folder


def folders_of(place: HubPlace) -> str:
    """Where the repository of a place has SAE folders, for messages."""
    found = sorted(f.rpartition("/")[0] or "its main folder" for f in hub.files_of(place) if f.split("/")[-1] == CFG)
    return f"; there is one in {', '.join(found[:12])}" if found else ", nor anywhere else"


def _read_by(place: Path, path: str | Path) -> str:
    """What to do with the checkpoint of another library that is at ``place``; empty where none is."""
    try:
        name = library_of(place)
    except InputError:  # a file of weights that cannot be looked into; what is wrong with the folder is said already
        return ""
    return f"; it is a checkpoint of {name}: mmsae convert {path} DST makes an SAE folder of it" if name else ""


def read_config(
    path: str | Path, revision: str | None = None, subfolder: str | None = None
) -> tuple[Path, dict[str, Any]]:
    """The folder of a path, a hub id or a URL, and what its ``cfg.json`` says to mmsae.

    What lies elsewhere is brought into a cache.

    Raises:
        InputError: No SAE there, another library's, or a newer format.
    """
    folder = _locate(path, revision, subfolder)
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


def tensors_of(folder: Path, block: Mapping[str, Any]) -> dict[str, StoredTensor]:
    """Weights and state of a folder that :func:`read_config` found, which are read when they are copied."""
    files = (WEIGHTS, STATE) if block["format"] > 1 else (WEIGHTS,)
    found = {name: t for file in files for name, t in tensor_file.stored(folder / file).items()}
    return {name: t for name, t in found.items() if name not in DERIVED}


def count_parameters(folder: Path) -> int:
    """Number of weights of a folder that :func:`read_config` found, which are not read."""
    state = ("normaliser.", "selector.")  # which format 1 has in the same file
    shapes = tensor_file.described(folder / WEIGHTS)[1].items()
    return sum(math.prod(s) for n, (_, s) in shapes if not n.startswith(state) and n not in DERIVED)


def push(
    folder: str | Path,
    place: HubPlace,
    evaluation: str = "",
    results: bytes | None = None,
    licence: str = "",
    private: bool = False,
    message: str = "Upload SAE",
    token: str | None = None,
) -> str:
    """Write an SAE folder to the hub in one commit, with a model card, unless its card is somebody's own text.

    Args:
        folder: The folder.
        place: Where; repository and branch are made if they are not there.
        evaluation: Section of the card on what was measured.
        results: ``results.json`` of that; one that is there of an earlier SAE is removed otherwise.
        licence: For the card.
        private: Whether a repository that is made is private.
        message: Of the commit.
        token: Default: huggingface_hub's own.

    Returns:
        The address of the repository.

    Raises:
        InputError: No SAE, a licence for a card that is not to be written, or a hub that does not take it.
    """
    folder, _ = read_config(folder)
    files: dict[str, Path | bytes] = {n: folder / n for n in (CFG, WEIGHTS, STATE) if (folder / n).is_file()}
    own = folder / CARD if (folder / CARD).is_file() else None
    if own is None or is_own(own.read_text(encoding="utf-8")):
        files[CARD] = model_card(json.loads((folder / CFG).read_text()), str(place), evaluation, licence).encode()
    elif licence:
        raise InputError(f"{own} is your own text, which stays as it is: name the licence {licence} in its first block")
    else:
        files[CARD] = own
    if results is not None:
        files[RESULTS] = results
    return hub.send(files, place, (STATE, RESULTS), private, message, token)
