"""The host that a name (:mod:`mmsae.hosts.names`) stands for, and what is known about it without its weights."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mmsae.errors import Warned
from mmsae.hosts import loaded
from mmsae.hosts.base import Host, check_device
from mmsae.hosts.diffusion import load as diffusion_load
from mmsae.hosts.libraries import library
from mmsae.hosts.lvlm.load import layer_width, load_model
from mmsae.hosts.names import HostName, loading, parse, reason, split_options, with_options
from mmsae.hosts.undrawn import load_undrawn
from mmsae.types import IMAGE, TEXT, InputError


def _architecture(host: HostName) -> HostName:
    """The architecture behind a hub id that open_clip lists as weights of its own; other hosts as they are."""
    open_clip = library("open_clip")
    from open_clip.pretrained import get_pretrained_cfg

    if host.kind == "hf-hub":
        for model, tag in open_clip.list_pretrained():
            if get_pretrained_cfg(model, tag).get("hf_hub", "").rstrip("/") == host.model:
                return HostName("open_clip", model)
    return host


def _model_config(host: HostName) -> dict[str, Any]:
    """open_clip's ``model_cfg``, without weights; of a hub id from open_clip's list where it is there, else the hub."""
    open_clip = library("open_clip")

    name = _architecture(host).open_clip_name
    try:
        config = open_clip.get_model_config(name)
    except json.JSONDecodeError as e:
        raise InputError(f"{Path(host.model) / 'open_clip_config.json'} is not valid JSON: {e}.") from e
    except Exception as e:  # open_clip, timm and the hub raise what they like
        raise InputError(f"the configuration of host {host.open_clip_name} cannot be read: {reason(e)}.") from e
    for field in ("embed_dim", "vision_cfg", "text_cfg"):
        if field not in config:
            raise InputError(f"the configuration of host {host.open_clip_name} has no field {field!r}.")
    return config


def host_modalities(name: str) -> tuple[str, ...]:
    """What a host encodes (of a pipeline: what captions give), without loading it; ``module:`` hosts are loaded."""
    host = parse(name)
    if host.kind == "module":
        return load_host(name).modalities
    if host.kind == "transformers":
        return _transformers_modalities(host, name)
    return {"timm": (IMAGE,), "diffusers": (TEXT,)}.get(host.kind, (IMAGE, TEXT))


def _transformers_modalities(host: HostName, name: str) -> tuple[str, ...]:
    from transformers import AutoConfig

    from mmsae.hosts.encoders.families import encodes, unknown_family

    options = {k: v for k, v in split_options(name)[1].items() if k in ("revision", "cache_dir")}
    with loading(name, host):
        config = AutoConfig.from_pretrained(host.model, **options)
    found = encodes({"model_type": config.model_type, "architectures": config.architectures})
    if not found:
        raise InputError(unknown_family(name, config.model_type))
    return found


def embed_width(name: str) -> int:
    """Width of the host's ``embed`` endpoints, from its configuration; no weights are read.

    A hub id that open_clip does not list needs the network once.
    """
    host = parse(name)
    if host.kind == "lvlm":
        return layer_width(host.model, "layers.0")
    if host.kind == "diffusers":
        return site_width(name, "text_encoder.layers.0")
    if host.kind in ("timm", "transformers"):
        return site_width(name, "image.embed")
    return load_host(name).width() if host.kind == "module" else int(_model_config(host)["embed_dim"])


def site_width(name: str, site: str) -> int:
    """Width of any site of a host; the host is built without memory or weights (on torch's meta device).

    Of ``module:`` hosts only their own function knows how they are built: they are loaded.
    """
    host = parse(name)
    if host.kind == "module":
        return load_host(name).width(site)
    if host.kind == "lvlm":
        return layer_width(host.model, site)
    if host.kind == "diffusers":
        return diffusion_load.site_width(host.model, site)
    host, options = _architecture(host), split_options(name)[1]
    options = {k: v for k, v in options.items() if k not in ("allow_random", "seed")}
    load = LOADERS.get(host.kind, _load_open_clip)
    with torch.device("meta"):
        return load(host, name, "meta", "fp32", False, True, **options)[0].resolve(site).layout.width


def load_host(
    name: str,
    device: str | torch.device = "cpu",
    precision: str = "fp32",
    *,
    allow_random: bool = False,
    seed: int | None = None,
    **options: Any,
) -> Host:
    """Load a frozen host.

    Args:
        name: See :mod:`mmsae.hosts.names`; options in it are those below, which go before them.
        device: Device that it runs on.
        precision: ``fp32``, or autocast ``bf16`` / ``fp16``.
        allow_random: Accept a host for which no weights are named or found, or only some of them, with random ones in
            their place. ``timm:NAME`` means its pretrained weights, unless this is set.
        seed: Seed of random weights (default 0); the global generator is left alone.
        **options: Options of ``open_clip.create_model`` (``force_image_size``, ``cache_dir``, ...),
            ``timm.create_model`` (``img_size``, ...), or ``from_pretrained`` of transformers (``dtype``: the
            checkpoint's own by default; ``device_map``, ...) or of diffusers (``dtype``, ``variant``,
            ``scheduler``, ...); of a ``module:`` host, arguments of its function.

    Returns:
        The host, whose hint holds the options that make it what it is.

    Raises:
        InputError: Unknown name, weights that cannot be had or do not fit, or no weights without ``allow_random``.
    """
    check_device(device)
    bare, own = split_options(name)
    options = own | options
    allow_random = bool(options.pop("allow_random", False)) or allow_random
    kept = options.pop("seed", 0)
    seed = kept if seed is None else seed
    host, hint = parse(bare), with_options(bare, options)
    random = allow_random and not _has_weights(host)
    if random:
        warnings.warn(f"host {bare}: no weights are loaded, they are random (seed {seed}).", Warned)
    elif host.kind == "open_clip" and host.weights is None:
        open_clip = library("open_clip")

        tags = ", ".join(open_clip.list_pretrained_tags_by_model(host.model)) or "none"
        raise InputError(f"host {bare!r} names no weights: write {bare}/TAG (tags: {tags}), or {loaded.ALLOW}.")
    elif host.folder is not None and not _has_weights(host):
        raise InputError(f"host {bare!r}: no *.safetensors, *.bin or *.pth in the folder; {loaded.ALLOW}.")
    load = LOADERS.get(host.kind, _load_open_clip)
    with torch.random.fork_rng(devices=[]):  # weights that are drawn before others are read: nobody else's draws
        if allow_random:
            torch.default_generator.manual_seed(seed)
        made = partial(load, host, hint, device, precision, allow_random, random, **options)
        # transformers and diffusers do not draw what they read, and a user's function may keep what it draws
        undrawn = not random and host.kind not in ("transformers", "lvlm", "diffusers", "module")
        host, some_random = load_undrawn(made, lambda found: found[0].model) if undrawn else made()
    if some_random:  # whoever keeps the hint was allowed it, and the fingerprint holds him to these weights
        host.hint = with_options(hint, {"allow_random": True} | ({"seed": seed} if seed else {}))
    return host


def _has_weights(host: HostName) -> bool:
    """Whether the name promises weights."""
    if host.folder is not None and host.kind != "diffusers":  # whose parts are judged one by one
        return any(p.suffix in (".safetensors", ".bin", ".pth") for p in host.folder.iterdir())
    return host.kind in ("hf-hub", "transformers", "lvlm", "diffusers", "module") or host.weights is not None


# of a kind of hosts: (name, its hint, device, precision, whether weights may be missing, whether to load none, options)
# -> (host, whether some of its weights are random)
Loader = Callable[..., tuple[Host, bool]]


def _load_open_clip(
    host: HostName, hint: str, device: Any, precision: str, allow_random: bool, random: bool, **options: Any
) -> tuple[Host, bool]:
    open_clip = library("open_clip")
    from open_clip.pretrained import get_pretrained_cfg

    from mmsae.hosts.encoders.open_clip import OpenCLIPHost

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
        logging.disable(logging.ERROR)  # random weights are refused or said here, and what it logs it raises too
        with loading(hint, host, asks=not random):
            model = open_clip.create_model(host.open_clip_name, host.weights, device=device, **options)
    finally:
        logging.disable(level)
    tokenizer = partial(open_clip.get_tokenizer, host.open_clip_name, cache_dir=options.get("cache_dir"))
    return OpenCLIPHost(model, config, tokenizer, hint, device, precision), random


def _load_timm(
    host: HostName, hint: str, device: Any, precision: str, allow_random: bool, random: bool, **options: Any
) -> tuple[Host, bool]:
    timm = library("timm")

    from mmsae.hosts.encoders.timm import TimmHost

    with loading(hint, host, asks=not random):
        if host.weights and not random:  # read here, for older versions of timm unpickle files
            state = timm.models.load_state_dict(host.weights, weights_only=True)
            own = {"state_dict": state, "source": "", "custom_load": False}
            options["pretrained_cfg_overlay"] = {**options.get("pretrained_cfg_overlay", {}), **own}
        with loaded.of_states() as read:
            model = timm.create_model(host.model, pretrained=not random, **options)
        model.pretrained_cfg.pop("state_dict", None)
    if not random:
        found = read.get(id(model)) or _without_classifier(model)
        random = loaded.check(hint, {"": found}, allow_random)
    return TimmHost(model, hint, device, precision), random


def _without_classifier(model: Any) -> loaded.Loaded:
    """What was left out of a file that is no state dictionary: the classifier, if there are other classes."""
    head = model.pretrained_cfg.get("classifier") or ()
    heads = (head,) if isinstance(head, str) else tuple(head)
    other = model.num_classes not in (0, model.pretrained_cfg.get("num_classes"))
    state = model.state_dict()
    return loaded.Loaded(len(state), [n for n in state if other and n.rpartition(".")[0] in heads], [])


def _load_transformers(
    host: HostName, hint: str, device: Any, precision: str, allow_random: bool, random: bool, **options: Any
) -> tuple[Host, bool]:
    from mmsae.hosts.encoders.transformers import load_model as load_encoder

    made, found = load_encoder(host.model, hint, device, precision, random, **options)
    return made, random or loaded.check(hint, {"": found}, allow_random)


def _load_module(
    host: HostName, hint: str, device: Any, precision: str, allow_random: bool, random: bool, **options: Any
) -> tuple[Host, bool]:
    from mmsae.hosts.encoders.module import load_module

    return load_module(host.model, hint, device, precision, **options), False


def _load_lvlm(
    host: HostName, hint: str, device: Any, precision: str, allow_random: bool, random: bool, **options: Any
) -> tuple[Host, bool]:
    from mmsae.hosts.lvlm.host import LVLMHost

    model, processor, found = load_model(host.model, device, precision, random, **options)
    some_random = random or loaded.check(hint, {"": found}, allow_random)
    return LVLMHost(model, processor, hint, None if "device_map" in options else device), some_random


def _load_diffusers(
    host: HostName, hint: str, device: Any, precision: str, allow_random: bool, random: bool, **options: Any
) -> tuple[Host, bool]:
    from mmsae.hosts.diffusion.host import DiffusionHost

    seed = torch.initial_seed() if allow_random else None  # which load_host has set
    pipeline, found = diffusion_load.load_pipeline(host.model, precision, seed, **options)
    some_random = loaded.check(hint, found, allow_random)
    return DiffusionHost(pipeline, hint, None if "device_map" in options else device), some_random


LOADERS: dict[str, Loader] = {
    "timm": _load_timm,
    "transformers": _load_transformers,
    "module": _load_module,
    "lvlm": _load_lvlm,
    "diffusers": _load_diffusers,
}  # other kinds are open_clip's
