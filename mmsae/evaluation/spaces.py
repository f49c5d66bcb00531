"""The feature spaces that every probe reads: the SAE's four, and controls of equal size.

Controls: the code of the same SAE with random weights; the leading principal components, as many as the code has
active latents per row (per token at token sites: the largest values over an image's tokens belong to several times as
many latents); all components at equal variance (whitening). Principal components are fitted on the source rows alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from mmsae.evaluation.features import Features, encode_features
from mmsae.evaluation.options import KINDS, PCA, RANDOM, WHITENED
from mmsae.evaluation.rows import TRAINED
from mmsae.metrics.components import principal
from mmsae.sae import SAE, random_control
from mmsae.types import IMAGE, Codes, InputError

CONTROLS = (RANDOM, PCA, WHITENED)


class Space(NamedTuple):
    """One kind of features of several sets of images."""

    features: str  #: ``raw``, ``code``, ``recon`` or ``resid``
    control: str  #: Empty, or which control (``mmsae.evaluation.rows``)
    sets: list[Tensor | Codes]  #: Per set ``(n, F)`` rows or codes

    @property
    def name(self) -> str:
        """``code``, or ``code (random)``."""
        return f"{self.features} ({self.control})" if self.control else self.features


def spaces(
    sets: Sequence[Features], sae: SAE, kinds: Sequence[str] = KINDS, controls: Sequence[str] = CONTROLS, seed: int = 0
) -> list[Space]:
    """Every kind of features of some sets; what is fitted is fitted on the first, the source.

    For token sites the control ``random`` is what the features hold of it (:attr:`Features.others`), and left out where
    they hold nothing.

    Raises:
        InputError: An unknown kind or control.
    """
    for what, given, known in (("features", kinds, KINDS), ("controls", controls, CONTROLS)):
        if odd := sorted(set(given) - set(known)):
            raise InputError(f"{what} has {odd[0]!r}, it can have {', '.join(known)}")
    pick = {"raw": "x", "code": "z", "recon": "recon", "resid": "resid"}
    out = [Space(k, TRAINED, [getattr(f, pick[k]) for f in sets]) for k in kinds]
    if RANDOM in controls and sets[0].pool == "one":
        control = random_control(sae, seed, {IMAGE: sets[0].x})
        out.append(Space("code", RANDOM, [encode_features(control, f.x).z for f in sets]))
    elif RANDOM in controls and all(RANDOM in f.others for f in sets):
        out.append(Space("code", RANDOM, [f.others[RANDOM].z for f in sets]))
    if {PCA, WHITENED} & set(controls):
        mean, axes, spread = principal(sets[0].x)
        k = max(1, round(sets[0].l0))
        projected = [(f.x.double() - mean) @ axes for f in sets]
        if PCA in controls:
            out.append(Space("raw", PCA, [p[:, :k].float() for p in projected]))
        if WHITENED in controls:
            out.append(Space("raw", WHITENED, [(p / spread).float() for p in projected]))
    return out
