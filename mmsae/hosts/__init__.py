"""Frozen hosts: load one by name, read its activations at a site, replace them there."""

from importlib import import_module
from typing import Any

from mmsae.hosts.base import Host, Rows, pick_device
from mmsae.hosts.encoders.encoder import Encoder, as_encoder
from mmsae.hosts.load import embed_width, host_modalities, load_host, site_width
from mmsae.hosts.names import HostName, named_host, parse, with_options
from mmsae.hosts.protocols import Answers, Generates

__all__ = [
    "Answers",
    "DiffusionHost",
    "Encoder",
    "Generates",
    "Host",
    "HostName",
    "LVLMHost",
    "OpenCLIPHost",
    "Rows",
    "TimmHost",
    "as_encoder",
    "embed_width",
    "host_modalities",
    "load_host",
    "named_host",
    "parse",
    "pick_device",
    "site_width",
    "with_options",
]

# open_clip, timm and transformers take seconds to import, so only who names them pays
_LATE = {
    "DiffusionHost": "diffusion.host",
    "LVLMHost": "lvlm.host",
    "OpenCLIPHost": "encoders.open_clip",
    "TimmHost": "encoders.timm",
}


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"mmsae.hosts.{_LATE[name]}"), name)
