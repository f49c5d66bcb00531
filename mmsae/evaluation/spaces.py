"""The feature spaces that every probe reads: the SAE's four, and controls of equal size.

Controls: the code of the same SAE with random weights; the leading principal components, as many as the code has
active latents per row (per token at token sites: the largest values over an image's tokens belong to several times as
many latents); all components at equal variance (whitening). Principal components are fitted on the source rows alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mmsae.evaluation.features import KINDS, Features, encode_features
from mmsae.evaluation.pooling import Moments
from mmsae.evaluation.rows import TRAINED
from mmsae.sae import SAE, random_control
from mmsae.types import IMAGE, Codes, InputError

RANDOM, PCA, WHITENED = "random", "pca", "whitened"
CONTROLS = (RANDOM, PCA, WHITENED)


class Space(NamedTuple):
    """One kind of features of several sets of images.

    Attributes:
        features: ``raw``, ``code``, ``recon`` or ``resid``.
        control: Empty, or which control (``mmsae.evaluation.rows``).
        sets: Per set ``(n, F)`` rows or codes.
    """

    features: str
    control: str
    sets: list[Tensor | Codes]

    @property
    def name(self) -> str:
        """``code``, or ``code (random)``."""
        return f"{self.features} ({self.control})" if self.control else self.features


def spaces(
    sets: Sequence[Features], sae: SAE, kinds: Sequence[str] = KINDS, controls: Sequence[str] = CONTROLS, seed: int = 0
) -> list[Space]:
    """Every kind of features of some sets; what is fitted is fitted on the first.

    Args:
        sets: Features of the source set first.
        sae: The SAE, for its random control.
        kinds: Of :data:`mmsae.evaluation.features.KINDS`.
        controls: Of :data:`CONTROLS`; for token sites ``random`` is what the features hold of it
            (:attr:`Features.others`), and left out where they hold nothing.
        seed: Of the random weights.

    Raises:
        InputError: An unknown kind or control.
    """
    for what, given, known in (("features", kinds, KINDS), ("controls", controls, CONTROLS)):
        if odd := sorted(set(given) - set(known)):
            raise InputError(f"{what} has {odd[0]!r}, it can have {', '.join(known)}")
    pick = {"raw": "x", "code": "z", "recon": "recon", "resid": "resid"}
    out = [Space(k, TRAINED, [getattr(f, pick[k]) for f in sets]) for k in kinds]
    if RANDOM in controls and sets[0].pool == "one":
        control = random_control(sae, seed)
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


def principal(x: Tensor | Moments, least: float = 1e-6) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, ``(d, r)`` principal axes in falling order, and ``(r,)`` standard deviations, in float64.

    Axes with less than ``least`` of the largest variance are left out: they are rounding.

    Args:
        x: Rows ``(N, d)``, or their moments.
        least: Least share of the largest variance.
    """
    if isinstance(x, Moments):
        mean, covariance = x.of()
    else:
        mean = x.double().mean(0)
        c = x.double() - mean
        covariance = c.T @ c / max(1, len(x) - 1)
    value, vector = torch.linalg.eigh(covariance)
    value, vector = value.flip(0), vector.flip(1)
    keep = value > least * value[0]
    return mean, vector[:, keep], value[keep].sqrt()


class Components(NamedTuple):
    """Principal components in the place of an SAE: all of them are on in every row.

    Attributes:
        mean: ``(d,)`` float64.
        axes: ``(d, k)`` float64.
    """

    mean: Tensor
    axes: Tensor

    @classmethod
    def leading(cls, x: Tensor | Moments, l0: float) -> Components:
        """The leading components of some rows, as many as a code has latents on."""
        mean, axes, _ = principal(x)
        return cls(mean, axes[:, : max(1, round(l0))])

    def encode(self, x: Tensor, modality: str = IMAGE) -> Codes:
        """Projections of rows ``(N, d)``."""
        z = (x.double() - self.mean.to(x.device)) @ self.axes.to(x.device)
        return Codes(z.float(), None, z.shape[1], modality)

    def decode(self, z: Codes, modality: str = IMAGE) -> Tensor:
        """``(N, d)`` reconstructions."""
        return (self.mean + z.values.double().cpu() @ self.axes.T).float()
