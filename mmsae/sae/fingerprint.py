"""Which SAE it is: one hash of what it computes, by which weights, statistics and jobs know whose they are."""

from __future__ import annotations

from mmsae.fingerprint import fingerprint
from mmsae.sae.registry import composition
from mmsae.sae.sae import SAE


def sae_fingerprint(sae: SAE) -> str:
    """32 hex digits of an SAE's parts, sizes and tensors; not of its sites (the first attach may name them), nor of the
    version or the training that made it.
    """
    # "format" is of this hash, not of the folder: filters and weights on disk go by it
    return fingerprint({"format": 1, **composition(sae)}, sae.state_dict())


def is_of(sae: SAE, found: str) -> bool:
    """Whether ``found`` is an SAE's fingerprint, or was by the two other hashes that earlier versions wrote."""
    if found == sae_fingerprint(sae):
        return True
    parts = composition(sae)
    with_sites = {"format": 1, **parts, "sites": {m: s.to_dict() for m, s in sae.sites.items()}}
    bare = {k: v for k, v in parts.items() if k != "modalities"}
    return found in (fingerprint(earlier, sae.state_dict()) for earlier in (with_sites, bare))
