"""Loading diffusers pipelines from the hub or a folder, from safetensors and without anybody's code."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmsae.errors import Warned
from mmsae.hosts.loaded import Loaded, plain_config, quiet, recorded
from mmsae.hosts.names import HostName, loading
from mmsae.types import InputError

TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
DENOISERS = ("unet", "transformer")
_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def load_pipeline(
    folder: str, precision: str, seed: int | None = None, **options: Any
) -> tuple[Any, dict[str, Loaded]]:
    """The pipeline, on the CPU or where a device map spreads it, and which weights of its parts were in the files.

    Somebody's code and pickled weights are refused.

    Args:
        folder: Hub id or folder.
        precision: ``bf16`` and ``fp16`` load weights of that type, ``fp32`` of theirs.
        seed: Seed of weights that the files lack; None: the caller will not accept any.
        **options: Options of ``from_pretrained``: ``variant``, ``revision``, ``cache_dir``, ``device_map``,
            ``scheduler``, ...
    """
    import diffusers
    from diffusers.utils import is_accelerate_available

    # diffusers loads a component of another package only if its module is imported already
    import mmsae.hosts.diffusion.patch_autoencoder  # noqa: F401

    _leave_out(folder, options)
    for option, only in (("trust_remote_code", False), ("use_safetensors", True), ("custom_pipeline", None)):
        if options.get(option, only) != only:
            raise InputError(f"host diffusers:{folder}: {option} is {options[option]}, but only {only} is allowed.")
        options.pop(option, None)
    dtype = options.pop("dtype", options.pop("torch_dtype", None))
    dtype = _DTYPES.get(dtype, dtype) if isinstance(dtype, str) else dtype
    dtype = _DTYPES[precision] if dtype is None and precision != "fp32" else dtype
    if dtype is not None:  # diffusers 0.42 renamed the option, and earlier ones do not know the new name
        options["torch_dtype" if int(diffusers.__version__.split(".")[0]) < 1 else "dtype"] = dtype
    if seed is not None or not is_accelerate_available():
        options.setdefault("low_cpu_mem_usage", False)  # else missing weights would have no memory
    with quiet(folder, "transformers", "diffusers"), recorded(seed) as found, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`torch_dtype` is deprecated")
        with loading(f"diffusers:{folder}", HostName("diffusers", folder)):
            pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, use_safetensors=True, **options)
    return pipeline, found


def _leave_out(folder: str, options: dict[str, Any]) -> None:
    """Leave out what a folder was saved without: Stable Diffusion 3 works without its T5, if that is said."""
    index = Path(folder) / "model_index.json"
    try:
        listed = json.loads(index.read_text()) if index.is_file() else {}
    except ValueError as e:
        raise InputError(f"host diffusers:{folder} cannot be loaded: {index} is not valid JSON: {e}") from e
    for part in ("text_encoder_3", "tokenizer_3"):
        if part in listed and part not in options:
            absent = listed[part] == [None, None]
            if not absent and not (Path(folder) / part).is_dir():
                warnings.warn(f"host diffusers:{folder}: its folder has no {part}, so it is loaded without.", Warned)
                absent = True
            if absent:
                options[part] = None


def denoiser_name(pipeline: Any) -> str:
    """``unet`` or ``transformer``; a pipeline with neither is refused."""
    found = next((n for n in DENOISERS if isinstance(getattr(pipeline, n, None), nn.Module)), None)
    if found is None:
        raise InputError(f"{type(pipeline).__name__} has no denoiser ({' or '.join(DENOISERS)}).")
    return found


def parts(pipeline: Any) -> nn.ModuleDict:
    """Text encoders and denoiser by their names, without wrappers of ``torch.compile``."""
    names = [*(n for n in TEXT_ENCODERS if getattr(pipeline, n, None) is not None), denoiser_name(pipeline)]
    return nn.ModuleDict({n: getattr(m := getattr(pipeline, n), "_orig_mod", m) for n in names})


def part_config(module: nn.Module) -> dict[str, Any]:
    """Configuration of a component without what says where it came from."""
    config = module.config.to_dict() if hasattr(module.config, "to_dict") else dict(module.config)
    drop = ("architectures", "model_type")
    return {k: v for k, v in plain_config(config).items() if not k.startswith("_") and k not in drop}


def site_width(folder: str, site: str) -> int:
    """Width of a text encoder's layer, from its configuration alone; of other sites only the pipeline knows it."""
    part, *rest = site.partition("[")[0].partition(":")[0].split(".")
    config = Path(folder) / part / "config.json"
    is_layer = len(rest) > 1 and rest[-2] in ("layers", "block") and rest[-1].isdigit()
    if part in TEXT_ENCODERS and (is_layer or rest == ["final_layer_norm"]) and config.is_file():
        values = json.loads(config.read_text())
        return int(values.get("hidden_size") or values["d_model"])
    raise InputError(f"the width of site {site!r} cannot be told without loading host diffusers:{folder}; give d_in.")


def layer_paths(root: str, rest: str) -> list[str]:
    """Where a text encoder's module may be, by the names of several releases of transformers."""
    for prefix in ("text_model.encoder.", "text_model.", "encoder."):
        rest = rest.removeprefix(prefix)
    names = [rest, rest.replace("layers.", "block.", 1)]
    prefixes = ("", "text_model.", "encoder.", "text_model.encoder.")
    return [f"{root}.{p}{n}" for p in prefixes for n in names]
