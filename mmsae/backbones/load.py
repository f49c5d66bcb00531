"""From a name to a host, and what can be known about a host without its weights.

Names: an open_clip architecture with the tag or file of its weights (``ViT-B-32/laion2b_s34b_b79k``), ``hf-hub:ID``,
``local-dir:DIR`` (open_clip's own folder format), ``timm:NAME``, ``lvlm:ID-or-FOLDER`` (vision-language models of
transformers), ``diffusers:ID-or-FOLDER`` (text-to-image pipelines).
"""

from __future__ import annotations

import difflib
import json
import logging
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError

from mmsae.backbones import diffusion_load
from mmsae.backbones.base import Backbone, check_device
from mmsae.backbones.lvlm_load import check_folder, layer_width, load_model
from mmsae.backbones.sites import resolve
from mmsae.types import IMAGE, TEXT, InputError

_LOAD_ERRORS = (OSError, EOFError, RuntimeError, ValueError, KeyError, TypeError, SafetensorError, UnpicklingError)


class HostName(NamedTuple):
    """A parsed host name.

    Attributes:
        kind: ``open_clip``, ``hf-hub``, ``local-dir``, ``timm``, ``lvlm`` or ``diffusers``.
        model: Architecture, hub id, folder or timm name.
        weights: Pretrained tag or checkpoint file of an open_clip architecture; None if none is named.
    """

    kind: str
    model: str
    weights: str | None = None

    @property
    def open_clip_name(self) -> str:
        """What open_clip calls it."""
        return self.model if self.kind == "open_clip" else f"{self.kind}:{self.model}"


def parse(name: str) -> HostName:
    """Parse a host name.

    Raises:
        InputError: No such open_clip architecture (with near matches) or folder.
    """
    kind, sep, rest = name.partition(":")
    if sep and kind in ("hf-hub", "local-dir", "timm", "lvlm", "diffusers"):
        if not rest:
            raise InputError(f"host {name!r} names nothing after '{kind}:'.")
        if kind == "local-dir" and not (Path(rest) / "open_clip_config.json").is_file():
            raise InputError(f"host {name!r}: {Path(rest) / 'open_clip_config.json'} does not exist.")
        if kind == "lvlm":
            check_folder(name, rest)
        if kind == "diffusers":
            diffusion_load.check_folder(name, rest)
        return HostName(kind, rest)
    import open_clip

    known = open_clip.list_models()
    parts = name.split("/")  # OpenAI writes ViT-B/32, open_clip ViT-B-32
    for n in range(len(parts), 0, -1):
        if (model := "-".join(parts[:n])) in known:
            return HostName("open_clip", model, "/".join(parts[n:]) or None)
    near = difflib.get_close_matches(parts[0], known, n=5, cutoff=0.5)
    hint = f"near matches: {', '.join(near)}" if near else "open_clip.list_models() lists them"
    kinds = "hf-hub:ID, local-dir:DIR, timm:NAME, lvlm:ID-or-FOLDER or diffusers:ID-or-FOLDER"
    raise InputError(f"host {name!r} is no open_clip architecture, {kinds}; {hint}.")


def _reason(e: BaseException) -> str:
    return (str(e).strip().splitlines() or [type(e).__name__])[0]


def _architecture(host: HostName) -> HostName:
    """The architecture behind a hub id that open_clip lists as weights of its own; other hosts as they are."""
    import open_clip
    from open_clip.pretrained import get_pretrained_cfg

    if host.kind == "hf-hub":
        for model, tag in open_clip.list_pretrained():
            if get_pretrained_cfg(model, tag).get("hf_hub", "").rstrip("/") == host.model:
                return HostName("open_clip", model)
    return host


def _model_config(host: HostName) -> dict[str, Any]:
    """open_clip's ``model_cfg``, without weights; of a hub id from open_clip's list where it is there, else the hub."""
    import open_clip

    try:
        config = open_clip.get_model_config(_architecture(host).open_clip_name)
    except json.JSONDecodeError as e:
        raise InputError(f"{Path(host.model) / 'open_clip_config.json'} is not valid JSON: {e}.") from e
    except _LOAD_ERRORS as e:
        raise InputError(f"the configuration of host {host.open_clip_name} cannot be read: {_reason(e)}.") from e
    for field in ("embed_dim", "vision_cfg", "text_cfg"):
        if field not in config:
            raise InputError(f"the configuration of host {host.open_clip_name} has no field {field!r}.")
    return config


def host_modalities(name: str) -> tuple[str, ...]:
    """What a host encodes (of a pipeline: what captions give), without loading it."""
    return {"timm": (IMAGE,), "diffusers": (TEXT,)}.get(parse(name).kind, (IMAGE, TEXT))


def embed_width(name: str) -> int:
    """Width of the host's ``embed`` endpoints, from its configuration; no weights are read.

    Raises:
        InputError: The configuration cannot be read (a hub id that open_clip does not list needs the network once).
    """
    host = parse(name)
    if host.kind == "lvlm":
        return layer_width(host.model, "layers.0")
    if host.kind == "diffusers":
        return site_width(name, "text_encoder.layers.0")
    return site_width(name, "image.embed") if host.kind == "timm" else int(_model_config(host)["embed_dim"])


def site_width(name: str, site: str) -> int:
    """Width of any site of a host; the host is built without memory or weights (on torch's meta device)."""
    host = parse(name)
    if host.kind == "lvlm":
        return layer_width(host.model, site)
    if host.kind == "diffusers":
        return diffusion_load.site_width(host.model, site)
    host = _architecture(host)
    load: Callable[..., Backbone] = _load_timm if host.kind == "timm" else _load_open_clip
    with torch.device("meta"):
        return resolve(load(host, name, "meta", "fp32", random=True), site).layout.width


def load_backbone(
    name: str,
    device: str | torch.device = "cpu",
    precision: str = "fp32",
    *,
    allow_random: bool = False,
    seed: int = 0,
    **options: Any,
) -> Backbone:
    """Load a frozen host.

    Args:
        name: See the module's docstring.
        device: Where it runs.
        precision: ``fp32``, or autocast ``bf16`` / ``fp16``.
        allow_random: Accept a host for which no weights are named or found, with random ones. ``timm:NAME`` means
            its pretrained weights, unless this is set.
        seed: Of random weights; the global generator is left alone.
        **options: For ``open_clip.create_model`` (``force_image_size``, ``cache_dir``, ...), ``timm.create_model``, or
            ``from_pretrained`` of transformers (``dtype``: the checkpoint's own by default; ``device_map``, ...) or of
            diffusers (``dtype``, ``variant``, ``scheduler``, ...).

    Raises:
        InputError: Unknown name, weights that cannot be had or do not fit, or no weights without ``allow_random``.
    """
    check_device(device)
    host = parse(name)
    random = allow_random and not _has_weights(host)
    if random:
        warnings.warn(f"host {name}: no weights are loaded, they are random (seed {seed}).")
    elif host.kind == "open_clip" and host.weights is None:
        import open_clip

        tags = ", ".join(open_clip.list_pretrained_tags_by_model(host.model)) or "none"
        raise InputError(f"host {name!r} names no weights: write {name}/TAG (tags: {tags}), or pass allow_random=True.")
    elif host.kind in ("local-dir", "lvlm") and not _has_weights(host):
        raise InputError(f"host {name!r}: no *.safetensors, *.bin or *.pth in the folder; pass allow_random=True.")
    kinds = {"timm": _load_timm, "lvlm": _load_lvlm, "diffusers": _load_diffusers}
    load: Callable[..., Backbone] = kinds.get(host.kind, _load_open_clip)
    with torch.random.fork_rng(devices=[], enabled=random):
        if random:
            torch.default_generator.manual_seed(seed)
        return load(host, name, device, precision, random=random, **options)


def _has_weights(host: HostName) -> bool:
    """Whether the name promises weights."""
    if host.kind == "local-dir":
        return any(p.suffix in (".safetensors", ".bin", ".pth") for p in Path(host.model).iterdir())
    if host.kind == "lvlm" and Path(host.model).is_dir():
        return any(p.suffix in (".safetensors", ".bin") for p in Path(host.model).iterdir())
    return host.kind in ("hf-hub", "lvlm", "diffusers") or host.weights is not None


def _load_open_clip(host: HostName, hint: str, device: Any, precision: str, random: bool, **options: Any) -> Backbone:
    import open_clip
    from open_clip.pretrained import get_pretrained_cfg

    from mmsae.backbones.open_clip import OpenCLIPBackbone

    config = _model_config(host)
    if host.weights and get_pretrained_cfg(host.model, host.weights).get("quick_gelu"):
        options.setdefault("force_quick_gelu", True)  # these weights were trained with it; open_clip only warns
    if options.get("force_quick_gelu"):
        config["quick_gelu"] = True
    for option, part, field in (
        ("force_image_size", "vision_cfg", "image_size"),
        ("force_context_length", "text_cfg", "context_length"),
        ("force_patch_dropout", "vision_cfg", "patch_dropout"),
    ):
        if option in options:
            config[part][field] = options[option]
    if random:
        options |= {"load_weights": False, "pretrained_text": False}
    else:
        options["require_pretrained"] = True
    level = logging.root.manager.disable
    try:
        logging.disable(logging.WARNING)  # it warns of random weights, which are refused or said here
        model = open_clip.create_model(host.open_clip_name, host.weights, device=device, **options)
    except _LOAD_ERRORS as e:
        raise InputError(f"host {hint!r} cannot be loaded: {_reason(e)}") from e
    finally:
        logging.disable(level)
    tokenizer = partial(open_clip.get_tokenizer, host.open_clip_name, cache_dir=options.get("cache_dir"))
    return OpenCLIPBackbone(model, config, tokenizer, hint, device, precision)


def _load_timm(host: HostName, hint: str, device: Any, precision: str, random: bool, **options: Any) -> Backbone:
    import timm

    from mmsae.backbones.timm import TimmBackbone

    try:
        model = timm.create_model(host.model, pretrained=not random, **options)
    except _LOAD_ERRORS as e:
        raise InputError(f"host {hint!r} cannot be loaded: {_reason(e)}") from e
    return TimmBackbone(model, hint, device, precision)


def _load_lvlm(host: HostName, hint: str, device: Any, precision: str, random: bool, **options: Any) -> Backbone:
    from mmsae.backbones.lvlm import LVLMBackbone

    try:
        model, processor = load_model(host.model, device, precision, random, **options)
    except (*_LOAD_ERRORS, ImportError) as e:
        raise e if isinstance(e, InputError) else InputError(f"host {hint!r} cannot be loaded: {_reason(e)}") from e
    return LVLMBackbone(model, processor, hint, None if "device_map" in options else device)


def _load_diffusers(host: HostName, hint: str, device: Any, precision: str, random: bool, **options: Any) -> Backbone:
    from mmsae.backbones.diffusion import DiffusionBackbone

    try:
        pipeline = diffusion_load.load_pipeline(host.model, device, precision, **options)
    except (*_LOAD_ERRORS, ImportError) as e:
        raise e if isinstance(e, InputError) else InputError(f"host {hint!r} cannot be loaded: {_reason(e)}") from e
    return DiffusionBackbone(pipeline, hint)
