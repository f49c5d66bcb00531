"""Interventions on a running host: ``with attach(host, {site: (sae, iv)}) as log: host.generate(...)``."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch

from mmsae.errors import Warned
from mmsae.hosts import Generates, Host
from mmsae.sae import SAE
from mmsae.steering.edits.intervention import BoundIntervention, Intervention
from mmsae.steering.edits.log import Log
from mmsae.types import InputError, Site

Pair = tuple[SAE, Intervention]
LARGE = 0.5  # a mean |dx| / |x| above this leaves the data that the host knows
_OPEN: WeakKeyDictionary[Host, list[str]] = WeakKeyDictionary()


def active_sites(host: Host) -> list[str]:
    """The sites with an open attachment, in their order; empty when all contexts are closed."""
    return list(_OPEN.get(host, ()))


def check_site(host: Host, site: Site | str, sae: SAE, allow_other_site: bool = False) -> tuple[Site, str]:
    """The site, and the modality whose dictionary decodes there, where the SAE may act.

    It may where it was trained, on whatever tokens the gate chooses there; an imported one that names no site, at any
    of its width. ``allow_other_site`` accepts another host, module, or end of it (``in`` or ``out``); never another
    signal (the update of a module for its output) nor another width.

    Raises:
        InputError: One sentence with what disagrees.
    """
    at = host.site(site, allow_other_site=True) if allow_other_site and isinstance(site, Site) else host.site(site)
    modality = at.modality
    if modality not in sae.modalities:
        if len(sae.modalities) > 1:
            raise InputError(f"site {at.module} is of {modality}, the SAE codes {', '.join(sae.modalities)}")
        modality = sae.modalities[0]
    if at.width != sae.d_in[modality]:
        raise InputError(f"site {at.module}:{at.io} has width {at.width}, the SAE takes {sae.d_in[modality]}")
    trained = sae.sites.get(modality)
    if trained is None:
        return at, modality
    if (trained.io == "update") != (at.io == "update"):
        raise InputError(
            f"this SAE was trained on {trained.module}:{trained.io}, a different signal than {at.module}:{at.io}: an "
            "update is output minus input"
        )
    if not allow_other_site:
        replace(trained, host=trained.host or at.host).refuse_other(at)
    return at, modality


@contextmanager
def attach(
    host: Host,
    interventions: Mapping[Site | str, Pair] | Sequence[tuple[Site | str, Pair]],
    allow_other_site: bool = False,
) -> Iterator[Log]:
    """While the context is open, the host computes with the interventions; several at one site act in their order.

    Args:
        host: Any host.
        interventions: ``{site: (sae, intervention)}``, or a list of such pairs, where one site may come twice.
        allow_other_site: See :func:`check_site`.

    Yields:
        The log: ``|dx|/|x|`` and share of rows touched, per site, step and phase.

    Raises:
        InputError: An SAE of another site, host, signal or width, a feature out of range, a unit without statistics, a
            window of steps on a host without steps or outside of its schedule, or a site that nothing reads.
    """
    pairs = list(interventions.items() if isinstance(interventions, Mapping) else interventions)
    attached = []
    for spec, (sae, iv) in pairs:
        site, modality = check_site(host, spec, sae, allow_other_site)
        bound = iv.bind(sae, modality, _dtype(host))
        bound.log.site = site.spec
        attached.append((site, bound))
        if isinstance(host, Generates):
            host.check_consumed(site)
    log = Log([bound.log for _, bound in attached])
    opened = _OPEN.setdefault(host, [])
    with ExitStack() as stack:
        for site, bound in attached:
            stack.enter_context(_edit(host, site, bound))
            opened.append(site.spec)
            stack.callback(_remove_last, opened, site.spec)
        yield log
    for s in log:
        if s.relative > LARGE:
            text = f"{s.site}: |dx| exceeds {LARGE} |x| in the mean (the log says by how much): outputs may break"
            warnings.warn(text, Warned, stacklevel=3)


def _edit(host: Host, site: Site, bound: BoundIntervention) -> Any:
    """The host's own context manager; hosts with a clock are told the window of steps, and check it."""
    if bound.steps is None or not isinstance(host, Generates):
        return host.edit(site, bound, where=True)
    bound.gate = replace(bound.gate, steps=None)  # what the host applies, for text as well, is not asked again
    return host.edit(site, bound, where=True, steps=bound.steps)


def _remove_last(items: list[str], item: str) -> None:
    del items[len(items) - 1 - items[::-1].index(item)]


def _dtype(host: Host) -> torch.dtype:
    """Type of the host's states."""
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(host.precision)
    return half or next((p.dtype for p in host.model.parameters() if p.is_floating_point()), torch.float32)
