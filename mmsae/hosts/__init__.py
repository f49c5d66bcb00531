"""Frozen hosts: load one by name, read its activations at a site, replace them there."""

from typing import Any

from mmsae.hosts.base import Backbone, Rows, pick_device
from mmsae.hosts.load import embed_width, host_modalities, load_backbone, site_width
from mmsae.hosts.names import HostName, named_host, parse, with_options

__all__ = [
    "Backbone",
    "DiffusionBackbone",
    "HostName",
    "LVLMBackbone",
    "OpenCLIPBackbone",
    "Rows",
    "TimmBackbone",
    "embed_width",
    "host_modalities",
    "load_backbone",
    "named_host",
    "parse",
    "pick_device",
    "site_width",
    "with_options",
]


def __getattr__(name: str) -> Any:
    # open_clip, timm and transformers take seconds to import, so only who names them pays
    if name == "OpenCLIPBackbone":
        from mmsae.hosts.encoders.open_clip import OpenCLIPBackbone as found
    elif name == "TimmBackbone":
        from mmsae.hosts.encoders.timm import TimmBackbone as found
    elif name == "DiffusionBackbone":
        from mmsae.hosts.diffusion.host import DiffusionBackbone as found
    elif name == "LVLMBackbone":
        from mmsae.hosts.lvlm.host import LVLMBackbone as found
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return found
