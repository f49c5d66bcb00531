"""Families of transformers' vision models that are encoders here, and what they encode; no library is imported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmsae.types import IMAGE, TEXT

_DUAL = "clip siglip siglip2 metaclip_2"
_IMAGES = (
    "vit deit beit data2vec-vision vit_msn ijepa dinov2 dinov2_with_registers dinov3_vit convnext convnextv2 swin "
    "swinv2 clip_vision_model siglip_vision_model siglip2_vision_model mlcd_vision_model"
)

#: ``{model_type: what it encodes}``; all of them are tried in tests/hosts/encoders/test_transformers.py.
FAMILIES = dict.fromkeys(_DUAL.split(), (IMAGE, TEXT)) | dict.fromkeys(_IMAGES.split(), (IMAGE,))


def kept_class(config: Mapping[str, Any]) -> str:
    """Name of the class that a model was saved by, where it has more than the bare model's embedding; else empty."""
    named = (config.get("architectures") or [""])[0] or ""
    return named if named.endswith(("ForImageClassification", "VisionModelWithProjection")) else ""


def encodes(config: Mapping[str, Any]) -> tuple[str, ...]:
    """What the model of a ``config.json`` encodes; nothing where its family is not known here."""
    found = FAMILIES.get(config.get("model_type", ""), ())
    return (IMAGE,) if found and kept_class(config) else found


def unknown_family(name: str, family: str) -> str:
    """The refusal of a family that is no encoder here."""
    return (
        f"host {name!r} is of the family {family}, which is no encoder that is known here: {', '.join(FAMILIES)} are."
    )
