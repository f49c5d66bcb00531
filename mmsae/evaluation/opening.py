"""An SAE and the host that it is read on, as the commands open them."""

from __future__ import annotations

from copy import copy

import torch

from mmsae.hosts import Backbone, load_backbone, named_host
from mmsae.sae import SAE


def open_host(sae: str | SAE, host: str | Backbone, device: str = "cpu", precision: str = "fp32"):
    """``(sae, host)`` of a command, as :func:`open_pair` gives them, on the SAE's own host alone."""
    return open_pair(sae, host, device, precision)[:2]


def open_pair(
    sae: str | SAE, host: str | Backbone, device: str = "cpu", precision: str = "fp32", allow_other_site: bool = False
) -> tuple[SAE, Backbone, list[str]]:
    """SAE and host of a command: both loaded, the SAE on the host's device, its sites checked and as the host's own.

    Args:
        sae: Folder or hub id, or a loaded SAE.
        host: Name, or a loaded host; empty: the host that the SAE's site hints at.
        device: ``cpu``, ``cuda`` or ``auto``.
        precision: Of the host.
        allow_other_site: Accept an SAE of another host that has the same module, of equal width: a half-precision copy,
            or a later checkpoint.

    Returns:
        The SAE, the host, and a warning for every site of another host.

    Raises:
        InputError: No host is named anywhere, or the SAE was trained on another one.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    sae = SAE.from_pretrained(sae) if isinstance(sae, str) else sae
    if isinstance(host, str):
        host = load_backbone(named_host(host, sae.sites), device=device, precision=precision)
    sae.attach(host, allow_other_site)
    other = [s for s in sae.sites.values() if s.host != host.fingerprint]
    if other:
        sae, sites = copy(sae), {m: host.site(s, allow_mismatch=True) for m, s in sae.sites.items()}
        sae.sites = sites
    said = [
        f"the SAE was trained on {s}, and is read on {host.hint} ({host.fingerprint[:12]}) all the same" for s in other
    ]
    return sae.to(host.device), host, said
