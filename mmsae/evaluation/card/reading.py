"""The SAE of a card: one of mmsae, or one of another library, whose files say neither host nor site.

visaebench codes standardised rows: before its SAEs come the mean of the activations and one standard deviation for all
dimensions, which its ``evaluate`` takes from the data and its checkpoints do not hold. They are taken from the suite's
training images here, and become the SAE's normaliser, so that raw rows go in and come out.
"""

from __future__ import annotations

from pathlib import Path

import torch

from mmsae.evaluation.images import HostPass, read_images
from mmsae.evaluation.labels import read_labels
from mmsae.evaluation.options import EvaluationRun, Foreign
from mmsae.evaluation.suite import Suite
from mmsae.evaluation.suite_data import QUICK_LIMIT
from mmsae.hosts import Host, named_host
from mmsae.interop.detect import load
from mmsae.metrics.components import Moments
from mmsae.sae import SAE, Normaliser
from mmsae.sae.foreign import library_of
from mmsae.shards import draw
from mmsae.types import InputError

STANDARDISING = ("visaebench",)  #: Libraries whose SAEs are of standardised rows


def read_sae(path: str) -> tuple[SAE, str]:
    """An SAE, and the library that wrote it (``mmsae`` where that is not known before it is loaded).

    Raises:
        InputError: It cannot be read.
    """
    library = (library_of(path) if Path(path).exists() else None) or "mmsae"
    return (SAE.from_pretrained(path) if library == "mmsae" else load(path)), library


def host_name(sae: SAE, host: str, path: str, foreign: Foreign) -> str:
    """The host on which an SAE is scored.

    Raises:
        InputError: Nothing names a host, or where it is read.
    """
    if not sae.sites and not foreign.site:
        raise InputError(f"SAE {path} does not say where its host is read: give --site, as blocks.11:out[patches]")
    return named_host(host, sae.sites, f"SAE {path}")


def complete(sae: SAE, library: str, host: Host, suite: Suite, foreign: Foreign, run: EvaluationRun) -> list[str]:
    """Give an SAE whose files do not say it its site, and what is done to rows before it; returns what to know of it.

    Raises:
        InputError: The host has no such site.
    """
    if sae.sites:
        return []
    (modality,) = sae.modalities
    site = host.site(foreign.site)
    if site.width != sae.d_in[modality]:
        raise InputError(f"{foreign.site} is {site.width} wide and the SAE takes {sae.d_in[modality]}")
    sae.sites = {modality: site}
    if not (library in STANDARDISING if foreign.standardise is None else foreign.standardise):
        return []
    paths = suite.paths("train")
    uids = sorted(read_labels(paths, "", must=False).value, key=draw)[:QUICK_LIMIT]
    moments = Moments()
    for rows in read_images(HostPass(host, site, modality, run=run), paths, set(uids), "mean and deviation"):
        moments.add(rows.x)
    standardise(sae, moments)
    return [
        f"the SAE is of standardised rows, as {library} gives it: the mean and the one deviation are those of "
        f"{moments.n:,} rows of {len(uids):,} training images"
    ]


def standardise(sae: SAE, moments: Moments) -> None:
    """Put ``(x - mean) / deviation`` before an SAE of one modality that has no normaliser, and its inverse behind it.

    ``deviation`` is one number, the root of the mean variance of the dimensions.
    """
    (modality,) = sae.modalities
    mean, covariance = moments.of()
    deviation = (covariance.diagonal().mean() * (moments.n - 1) / moments.n).sqrt()
    normaliser = Normaliser(centre=True, scale="rms")
    normaliser.build(sae.d_in)
    normaliser.load_state_dict(
        {
            f"mean_{modality}": mean.float(),
            f"factor_{modality}": (1 / deviation).float(),
            f"variance_{modality}": torch.tensor(float(len(mean))),
        }
    )
    sae.normaliser = normaliser.to(next(sae.parameters()).device).eval()
