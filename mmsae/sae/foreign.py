"""Which library wrote a folder or a file of an SAE, told by the names of its files and of what is in them.

It lies below :mod:`mmsae.interop`, which reads those libraries, so that an SAE folder that is another library's can be
refused by that name.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from mmsae.types import InputError

VL_SAE_KEYS = {"encoder": "vl_sae", "v_encoder.weight": "dual", "decoder.0.weight": "shared"}
#: Names under which visaebench looks for weights and for their description.
VISAEBENCH = (("sae.pt", "model.safetensors", "model.pt"), ("config.json", "config.yaml", "config.yml"))


def read_json(file: Path) -> dict[str, Any]:
    """The object that a JSON or YAML file holds; empty where there is no such file, or it holds another thing."""
    if not file.is_file():
        return {}
    text = file.read_text(errors="replace")
    if file.suffix in (".yaml", ".yml"):
        import yaml

        value = yaml.safe_load(text)
    else:
        try:
            value = json.loads(text)
        except ValueError:
            return {}
    return value if isinstance(value, dict) else {}


def header(file: Path) -> dict[str, Any]:
    """The JSON object in the first line of a file, which saev writes before the tensors; empty where there is none."""
    with open(file, "rb") as f:
        line = f.readline(1 << 16) if f.read(1) == b"{" else b""
    try:
        return json.loads(b"{" + line) if line else {}
    except ValueError:
        return {}


def state_of(file: Path, stream: BinaryIO | None = None) -> dict[str, Any]:
    """The state dict in a torch file (or in the rest of it); nothing but tensors and plain containers is unpickled.

    Raises:
        InputError: The file is damaged, or holds objects of other classes.
    """
    import torch

    try:
        state = torch.load(stream or file, map_location="cpu", weights_only=True)
    except Exception as e:  # torch raises a dozen kinds for broken or unsafe files; each means the same to the user
        why = f"{type(e).__name__}: {str(e).splitlines()[0]}"
        raise InputError(f"{file} cannot be read as a file of tensors ({why})") from e
    if not isinstance(state, dict):
        raise InputError(f"{file} holds a {type(state).__name__}, not a state dict")
    return state


def one_file(folder: Path, suffix: str) -> Path | None:
    """The only file of a folder with a suffix; None where there are none or several."""
    files = sorted(folder.glob(f"*{suffix}"))
    return files[0] if len(files) == 1 else None


def visaebench_files(folder: Path) -> tuple[Path, Path] | None:
    """The file of weights and its description, by the names that visaebench looks for."""
    found = [next((folder / n for n in names if (folder / n).is_file()), None) for names in VISAEBENCH]
    return None if None in found else (found[0], found[1])


def _visaebench(folder: Path) -> bool:
    files = visaebench_files(folder)
    return files is not None and bool({"activation", "sae_type", "architecture"} & read_json(files[1]).keys())


def _config(name: str, keys: set[str], weights: str) -> Callable[[Path], bool]:
    """A test of folders: a JSON file that has some keys, beside a file of weights."""
    return lambda p: keys <= read_json(p / name).keys() and any(p.glob(weights))


def _saeuron(folder: Path) -> bool:
    return bool({"batch_topk", "sample_topk", "input_unit_norm"} & read_json(folder / "cfg.json").keys())


_sparsify = _config("cfg.json", {"d_in", "k"}, "sae.safetensors")
MARKS: dict[str, Callable[[Path], bool]] = {
    "mmsae": lambda p: "mmsae" in read_json(p / "cfg.json"),
    "saeuron": lambda p: _sparsify(p) and _saeuron(p),
    "sparsify": _sparsify,
    "saelens": _config("cfg.json", {"d_in"}, "sae_weights.safetensors"),
    "dictionary_learning": _config("config.json", {"trainer"}, "ae.pt"),
    "sdxl_unbox": _config("config.json", {"n_dirs_local", "d_model", "k"}, "state_dict.pth"),
    "vit_prisma": _config("config.json", {"activation_fn_str", "hook_point_layer", "d_in"}, "*.pt"),
    "visaebench": _visaebench,
}
"""By which the folders of each library are known; the first that fits."""


def library_of(path: str | Path) -> str | None:
    """The library that wrote a folder or a file; None where none that is known did.

    Raises:
        InputError: The file of weights that is to be looked into is damaged or unsafe.
    """
    path = Path(path)
    if path.is_dir():
        if name := next((name for name, fits in MARKS.items() if fits(path)), None):
            return name
        found = [f for suffix in (".pt", ".pth") if (f := one_file(path, suffix))]
        return library_of(found[0]) if len(found) == 1 else None
    if not path.is_file() or path.suffix not in (".pt", ".pth"):
        return None
    first = header(path)
    if first:
        return "saev" if "d_vit" in first or "schema" in first else None
    keys = state_of(path).keys()
    if "dictionary._weights" in keys or "dictionary.C" in keys:
        return "overcomplete"
    return "vlsae" if "vision_projection.weight" in keys or VL_SAE_KEYS.keys() & keys else None
