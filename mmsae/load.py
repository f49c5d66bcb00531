"""An SAE together with the host whose activations it reads."""

from __future__ import annotations

from copy import copy
from pathlib import Path

from mmsae.hosts import Host, load_host, named_host, pick_device
from mmsae.sae import SAE


def named_pair(sae: str | Path | SAE, host: str = "") -> tuple[SAE, str]:
    """Load an SAE, and name its host, which is not loaded: ``host``, or else the one that the SAE's sites name."""
    what = "the SAE" if isinstance(sae, SAE) else f"SAE {sae}"
    sae = sae if isinstance(sae, SAE) else SAE.from_pretrained(sae)
    return sae, named_host(host, sae.sites, what)


def load_unchecked(
    sae: str | Path | SAE, host: str | Host = "", device: str = "auto", precision: str = "fp32"
) -> tuple[SAE, Host]:
    """Load an SAE and its host onto one device, as :func:`load_pair` does, for who checks the sites that it uses.

    Steering may act at another site than those of the SAE, and an SAE on aligned states is of host and aligner.
    """
    if isinstance(host, str):
        sae, name = named_pair(sae, host)
        host = load_host(name, device=pick_device(device), precision=precision)
    sae = sae if isinstance(sae, SAE) else SAE.from_pretrained(sae)
    return sae.to(host.device), host


def load_pair(
    sae: str | Path | SAE,
    host: str | Host = "",
    device: str = "auto",
    precision: str = "fp32",
    allow_other_site: bool = False,
) -> tuple[SAE, Host]:
    """Load an SAE and its host onto one device.

    The sites of the SAE that is returned are checked, and are the host's own: ``host.read(batch, sae.sites.values())``.

    Args:
        sae: Folder or hub id, or a loaded SAE.
        host: Name (see :mod:`mmsae.hosts.names`), or a loaded host; empty: the host that the SAE's sites name.
        device: ``cpu``, ``cuda``, ``cuda:N`` or ``auto``; a loaded host stays where it is.
        precision: Arithmetic of the host: ``fp32``, ``bf16`` or ``fp16``.
        allow_other_site: Accept an SAE of another host that has the same module, of equal width: a half-precision copy,
            or a later checkpoint. :func:`other_host_warnings` says so.

    Raises:
        InputError: No host is named anywhere, it cannot be loaded, or the SAE was trained on another one.
    """
    sae, host = load_unchecked(sae, host, device, precision)
    sae.attach(host, allow_other_site)
    if any(s.host != host.fingerprint for s in sae.sites.values()):
        sae, sites = copy(sae), {m: host.site(s, allow_other_site=True) for m, s in sae.sites.items()}
        sae.sites = sites
    return sae, host


def other_host_warnings(sae: SAE, host: Host) -> list[str]:
    """One sentence for each site of an SAE, as it was trained, that is of another host."""
    return [
        f"the SAE was trained on {s}, and is read on {host.hint} ({host.fingerprint[:12]}) all the same"
        for s in sae.sites.values()
        if s.host != host.fingerprint
    ]
