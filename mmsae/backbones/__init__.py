"""Frozen hosts: load one by name, read its activations at a site, replace them there."""

from typing import Any

from mmsae.backbones.base import Backbone, Rows
from mmsae.backbones.load import embed_width, host_modalities, load_backbone, site_width
from mmsae.backbones.names import HostName, named_host, parse, with_options

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
    "site_width",
    "with_options",
]


def __getattr__(name: str) -> Any:
    # open_clip, timm and transformers take seconds to import, so only who names them pays
    if name == "OpenCLIPBackbone":
        from mmsae.backbones.open_clip import OpenCLIPBackbone as found
    elif name == "TimmBackbone":
        from mmsae.backbones.timm import TimmBackbone as found
    elif name == "DiffusionBackbone":
        from mmsae.backbones.diffusion import DiffusionBackbone as found
    elif name == "LVLMBackbone":
        from mmsae.backbones.lvlm import LVLMBackbone as found
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return found
