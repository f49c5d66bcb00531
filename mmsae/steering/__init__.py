"""Edits of SAE codes in a running host, and measurements of what they do."""

from mmsae.lazy import lazy

__all__, __getattr__ = lazy(
    __name__,
    {
        "edits.attach": "active_sites attach",
        "edits.edit": "Edit",
        "edits.gate": "Gate",
        "edits.intervention": "Intervention",
        "edits.units": "FeatureStats",
        "methods.kl_strength": "KLSearch search_kl",
    },
)
