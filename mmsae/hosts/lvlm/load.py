"""Loading vision-language models from the hub or a folder; the two are the same code."""

from __future__ import annotations

import json
from typing import Any

import torch

from mmsae.hosts.libraries import library
from mmsae.hosts.loaded import Loaded, dtype_of, quiet, silent
from mmsae.hosts.names import HostName, loading
from mmsae.types import InputError


def load_config(folder: str, **options: Any) -> Any:
    """The model's configuration, without weights; where transformers does not know it, ValueError or OSError."""
    import transformers

    library("timm")  # which the tower needs
    import mmsae.hosts.lvlm.open_clip_tower  # noqa: F401  registers the tower of the tiny LLaVA

    return transformers.AutoConfig.from_pretrained(folder, **options)


def layer_width(folder: str, site: str) -> int:
    """Width of a site at a decoder layer, from the configuration; that of others only the model knows."""
    parts = site.partition("[")[0].partition(":")[0].split(".")
    if len(parts) < 2 or parts[-2] != "layers" or not parts[-1].isdigit():
        raise InputError(f"the width of site {site!r} cannot be told without loading host lvlm:{folder}; name a layer.")
    try:
        return load_config(folder).get_text_config().hidden_size
    except (OSError, ValueError, json.JSONDecodeError) as e:
        raise InputError(f"the configuration of host lvlm:{folder} cannot be read: {str(e).splitlines()[0]}") from e


def load_model(folder: str, device: Any, precision: str, random: bool, **options: Any) -> tuple[Any, Any, Loaded]:
    """Model, processor, and which of the model's weights were in the files.

    Args:
        folder: Hub id or folder.
        device: Device of the model; not used with a ``device_map``.
        precision: ``bf16`` and ``fp16`` load weights of that type; ``fp32`` leaves it to ``dtype``.
        random: Take the configuration only.
        **options: Options of ``from_pretrained``: ``dtype`` (default ``auto``, the checkpoint's own), ``device_map``,
            ``attn_implementation``, ``revision``, ``cache_dir``, ``quantization_config``, ...
    """
    import transformers

    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    dtype = dtype_of(options.pop("dtype", None) or half or "auto")
    shared = {k: options[k] for k in ("revision", "cache_dir", "token", "local_files_only") if k in options}
    auto, info = transformers.AutoModelForImageTextToText, None
    options.setdefault("ignore_mismatched_sizes", True)  # refused by its caller, with names and shapes
    with loading(f"lvlm:{folder}", HostName("lvlm", folder)), quiet(folder), silent():
        config = load_config(folder, **shared)
        if random:
            model = auto.from_config(config, **({} if dtype == "auto" else {"dtype": dtype}))
        else:
            model, info = auto.from_pretrained(folder, dtype=dtype, output_loading_info=True, **options)
        if "device_map" not in options:
            model = model.to(device)
        processor = transformers.AutoProcessor.from_pretrained(folder, **shared)
    return model, processor, Loaded(0, [], []) if info is None else Loaded.of(model, info)


def decoder_path(model: Any) -> str:
    """Module path of the language model (in transformers 4 it is not inside ``model``)."""
    decoder = model.get_decoder()
    return next(name for name, module in model.named_modules() if module is decoder)
