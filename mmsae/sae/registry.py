"""The closed list of part names that a checkpoint may use: a file can never name a class to import."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from mmsae.sae.dictionary import Dictionary
from mmsae.sae.encoder import AffineEncoder, DistanceEncoder, PerModalityEncoder
from mmsae.sae.normaliser import Normaliser
from mmsae.sae.part import Part
from mmsae.sae.selector import Pursued, ReLU, TopK
from mmsae.sae.variants.afa import EnergyTopK
from mmsae.sae.variants.archetypal import ArchetypalDictionary
from mmsae.sae.variants.batch_topk import BatchTopK
from mmsae.sae.variants.cb_sae import ConceptTopK
from mmsae.sae.variants.feature_choice import FeatureChoice
from mmsae.sae.variants.gated import GatedEncoder
from mmsae.sae.variants.gba import GroupBias, ScaledDictionary
from mmsae.sae.variants.gradient import GradientTopK
from mmsae.sae.variants.group_max import GroupMax
from mmsae.sae.variants.group_sparse import PairMask
from mmsae.sae.variants.itda import GrowingDictionary
from mmsae.sae.variants.jumprelu import JumpReLU
from mmsae.sae.variants.matching_pursuit import PursuitEncoder
from mmsae.sae.variants.pursuit_at_l0 import PursuitAtL0
from mmsae.sae.variants.sparc import JointTopK
from mmsae.sae.variants.splice import FrozenDictionary, LassoEncoder
from mmsae.sae.variants.vsae import GaussianEncoder
from mmsae.types import InputError

_CLASSES: dict[str, tuple[type[Part], ...]] = {
    "normaliser": (Normaliser,),
    "encoder": (
        AffineEncoder,
        DistanceEncoder,
        PerModalityEncoder,
        GatedEncoder,
        GaussianEncoder,
        GroupBias,
        LassoEncoder,
        PursuitEncoder,
        PursuitAtL0,
    ),
    "selector": (
        TopK,
        ReLU,
        BatchTopK,
        EnergyTopK,
        FeatureChoice,
        GradientTopK,
        GroupMax,
        JointTopK,
        JumpReLU,
        ConceptTopK,
        PairMask,
        Pursued,
    ),
    "dictionary": (
        Dictionary,
        ScaledDictionary,
        ArchetypalDictionary,
        FrozenDictionary,
        GrowingDictionary,
    ),
}
PARTS: dict[str, dict[str, type[Part]]] = {slot: {c.name: c for c in parts} for slot, parts in _CLASSES.items()}
INNER = ("encoder", "selector")  # parts that a part may hold


def part_config(part: nn.Module) -> dict[str, Any]:
    """``{"name": registry name, **arguments}`` of a part."""
    return {"name": part.name, **part.config()}


def composition(sae: Any) -> dict[str, Any]:
    """Sizes and parts of an SAE, without weights, sites or history; what two equal models have in common."""
    rounded = {} if sae.precision in (None, "fp32") else {"precision": sae.precision}
    return rounded | {
        "modalities": list(sae.modalities),
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "normaliser": part_config(sae.normaliser),
        "encoder": part_config(sae.encoder),
        "selector": part_config(sae.selector),
        "dictionaries": {key: part_config(d) for key, d in sae.dictionaries.items()},
    }


def oddity(slot: str, config: Any) -> str:
    """What is wrong with the form of a part's dict; empty where nothing is, or its name is unknown here."""
    if not isinstance(config, dict):
        return f"it is {config!r:.40}"
    for inner in INNER:
        if isinstance(config.get(inner), dict) and (odd := oddity(inner, config[inner])):
            return odd
    if config.get("name") not in PARTS[slot]:
        return ""
    known = inspect.signature(PARTS[slot][config["name"]]).parameters
    return next((f"{config['name']} takes no {field}" for field in config if field not in ("name", *known)), "")


def make_part(slot: str, config: dict[str, Any]) -> nn.Module:
    """Build an unsized part from :func:`part_config`'s dict.

    Raises:
        InputError: A name that this version does not know.
    """
    config = dict(config)
    name = config.pop("name", None)
    if name not in PARTS[slot]:
        raise InputError(f"unknown {slot} {name!r} in the checkpoint; this version knows {sorted(PARTS[slot])}")
    for inner in INNER:
        if isinstance(config.get(inner), dict):
            config[inner] = make_part(inner, config[inner])
    return PARTS[slot][name](**config)
