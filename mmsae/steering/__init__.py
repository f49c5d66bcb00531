"""Edits of SAE codes in a running host, and measurements of what they do."""

from mmsae.steering.edits.attach import active_sites, attach
from mmsae.steering.edits.edit import Edit
from mmsae.steering.edits.gate import FVU, Gate
from mmsae.steering.edits.intervention import Intervention
from mmsae.steering.edits.units import FeatureStats
from mmsae.steering.methods.kl_strength import KLSearch, search_kl

__all__ = [
    "FVU",
    "Edit",
    "FeatureStats",
    "Gate",
    "Intervention",
    "KLSearch",
    "active_sites",
    "attach",
    "search_kl",
]
