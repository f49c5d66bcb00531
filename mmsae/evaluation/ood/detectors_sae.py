"""Out-of-distribution detectors that need an SAE's codes or its reconstruction; larger confidence = more like ID.

``recon``, ``rarity`` and ``support`` are this library's definitions. ``cap_spearman`` follows the idea of Class
Activation Profiles (OpenReview rxiWsoM6Cx, abstract), with M = 256 chosen here. ``cap_energy`` follows the "core energy
profile" of arXiv 2604.26409 (abstract); its form is reconstructed: the paper's text could not be read.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mmsae.evaluation.features import Features
from mmsae.metrics.sparsity import latent_sums
from mmsae.metrics.statistics import spearman
from mmsae.types import Codes

CORE = 0.9  # share of a profile's mass that its core dimensions hold
REST = 1e-6  # least probability of what lies outside the core


def recon(features: Features) -> Tensor:
    """``-|x - xhat|^2 / |x|^2``. Without the division larger inputs would look stranger."""
    return -features.error.double()


def rarity(z: Codes, q: Tensor) -> Tensor:
    """Log-likelihood of which latents fire, if they fired independently at :func:`firing_rates` ``q (d_sae,)``."""
    q = q.double()
    gain = torch.log(q) - torch.log1p(-q)
    return torch.log1p(-q).sum() + _over_active(z, gain)


def firing_rates(z: Codes) -> Tensor:
    """``(d_sae,)`` smoothed rates ``(n_k + 1) / (n + 2)`` of training codes."""
    return (latent_sums(z)[0].double() + 1) / (z.n + 2)


def _over_active(z: Codes, weight: Tensor) -> Tensor:
    """``(n,)`` sum of ``weight (d_sae,)`` over the latents that fire."""
    on = z.values != 0
    return on.double() @ weight if z.indices is None else (weight[z.indices] * on).sum(1)


class Profiles(NamedTuple):
    """What the codes of each training class are like."""

    mean: Tensor  #: ``(C, d_sae)`` mean code of each class
    count: Tensor  #: ``(C, d_sae)`` samples of the class in which the latent fired

    @classmethod
    def fit(cls, z: Codes, y: Tensor, n_classes: int) -> Profiles:
        """Profiles of training codes with classes ``y (n,)``."""
        mean = z.pool(y, n_classes).double()
        fired = z._replace(values=(z.values != 0).double())
        return cls(mean, fired.pool(y, n_classes) * torch.bincount(y, minlength=n_classes).double()[:, None])

    def support(self, z: Codes, predicted: Tensor) -> Tensor:
        """Minus the share of active latents that the predicted class never showed; -1 where none is active."""
        unseen, l0, out = self.count == 0, z.l0().double(), torch.empty(z.n, dtype=torch.float64)
        for c, rows in _by_class(predicted):
            out[rows] = -_over_active(z.rows(rows), unseen[c].double())
        return torch.where(l0 > 0, out / l0.clamp(min=1), -1.0)

    def cap_spearman(self, z: Codes, predicted: Tensor, top: int = 256) -> Tensor:
        """Spearman correlation with the predicted class's profile on its ``top`` largest latents.

        Elsewhere both are mostly zero, and ties would rule. 0 for codes that are empty there.
        """
        out = torch.empty(z.n, dtype=torch.float64)
        for c, rows in _by_class(predicted):
            profile = self.mean[c]
            ids = profile.abs().topk(min(top, max(2, int((profile != 0).sum())))).indices
            out[rows] = spearman(z.rows(rows).gather(ids).double().T, profile[ids]).nan_to_num(0)
        return out

    def cap_energy(self, z: Codes, predicted: Tensor) -> Tensor:
        """``-KL(z || p)`` of normalised code and profile on the profile's core latents (reconstructed form).

        The core is the smallest set with 90% of the mass; all other mass counts as one more cell, so that a code
        outside the core, or an empty one, is far from the profile.
        """
        out = torch.empty(z.n, dtype=torch.float64)
        for c, rows in _by_class(predicted):
            p, order = self.mean[c].abs().sort(descending=True)
            p = p / p.sum().clamp(min=1e-300)
            core = int((p.cumsum(0) < CORE - 1e-9).sum()) + 1
            p = torch.cat([p[:core], (1 - p[:core].sum()).clamp(min=REST)[None]])
            part = z.rows(rows)
            total = part.values.double().abs().sum(1, keepdim=True)
            inside = part.gather(order[:core]).double().abs() / total.clamp(min=1e-300)
            q = torch.cat([inside, (1 - inside.sum(1, keepdim=True)).clamp(min=0)], 1)
            out[rows] = -(torch.xlogy(q, q) - q * p.clamp(min=1e-12).log()).sum(1)
        return out


def _by_class(predicted: Tensor) -> Iterator[tuple[int, Tensor]]:
    """``(class, its rows)`` of the classes that occur."""
    for c in predicted.unique().tolist():
        yield c, (predicted == c).nonzero()[:, 0]
