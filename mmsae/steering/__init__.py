"""Edits of SAE codes in a running host, and measurements of what they do."""

from mmsae.steering.attach import active_sites, attach
from mmsae.steering.edit import Edit
from mmsae.steering.gate import FVU, Gate
from mmsae.steering.intervention import Intervention
from mmsae.steering.kl import KLSearch, next_token_kl, search_kl
from mmsae.steering.units import FeatureStats

__all__ = [
    "FVU",
    "Edit",
    "FeatureStats",
    "Gate",
    "Intervention",
    "KLSearch",
    "active_sites",
    "attach",
    "next_token_kl",
    "search_kl",
]
