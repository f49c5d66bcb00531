"""Are two dictionaries, or two representations of the same samples, the same? Each measure beside its chance level.

The measures, and what is wrong with other forms of them, are those of ITDA's comparison (arXiv 2505.17769).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from mmsae.metrics.pairs.bridge import stability
from mmsae.types import InputError

KINDS = ("hungarian", "jaccard", "cka", "svcca", "relative")
DRAWS = 5  # of a chance level that is measured


class Similarity(NamedTuple):
    """A similarity, and what it would be by chance."""

    value: float  #: 1 for the same.
    chance: float  #: NaN where it is not known.

    @property
    def above_chance(self) -> float:
        """1 for the same, 0 at chance."""
        return (self.value - self.chance) / (1 - self.chance)


@torch.no_grad()
def dictionary_similarity(
    a: Tensor, b: Tensor, kind: str = "hungarian", population: int | None = None, size: int | None = None, seed: int = 0
) -> Similarity:
    """How similar two dictionaries or two representations are, and how similar by chance.

    ========== ================================== =========================================== ========================
    kind       a, b                               value                                       chance
    ========== ================================== =========================================== ========================
    hungarian  ``(F, d)`` atoms, equal d          mean cosine over the best one-to-one match  b turned at random
    jaccard    ``(n, 2)`` int64 names of atoms    ``|A and B| / |A or B|``                    random subsets
    cka        ``(N, d)`` of the same N samples   linear CKA                                  b's samples shuffled
    svcca      ``(N, d)`` of the same N samples   mean correlation of ``size`` singular       b's samples shuffled
                                                  directions
    relative   ``(N, d)`` of the same N samples   mean cosine of samples' cosines with        b's samples shuffled
                                                  ``size`` samples, the anchors
    ========== ================================== =========================================== ========================

    ``cka``, ``svcca`` and ``relative`` do not change when one side is rotated or rescaled, nor does ``jaccard`` of
    dictionaries built from it. Columns of ``cka`` and ``svcca`` are centred and not standardised: standardising undoes
    that. Widths may differ.

    Args:
        a: One side. Names are :attr:`mmsae.sae.GrowingDictionary.atom_index`; rows of -1 do not count.
        b: The other.
        kind: Which measure.
        population: ``jaccard``: number of activations that both dictionaries chose from; None: chance is not known.
        size: ``svcca``: directions (20); ``relative``: anchors (300); no more than there are.
        seed: Of anchors, rotations and shuffles.

    Raises:
        InputError: An unknown kind, or shapes that cannot be compared.
    """
    if kind not in KINDS:
        raise InputError(f"kind of a similarity must be one of {', '.join(KINDS)}, not {kind!r}")
    if kind == "jaccard":
        return _jaccard(a, b, population)
    a, b = a.detach().double(), b.detach().to(a.device).double()
    generator = torch.Generator().manual_seed(seed)
    if kind == "hungarian":
        turned = (b @ _rotation(b.shape[1], generator).to(b) for _ in range(DRAWS))
        matched, *chance = (stability(a, c)["stability"] for c in (b, *turned))
        return Similarity(matched, float(np.mean(chance)))
    if len(a) != len(b) or len(a) < 2:
        raise InputError(f"{kind} compares the same samples, at least 2, not {len(a)} and {len(b)} rows")
    value: Callable[[Tensor, Tensor], float] = _cka
    if kind == "svcca":
        value = partial(_svcca, components=20 if size is None else size)
    elif kind == "relative":
        order, n = torch.randperm(len(a), generator=generator), min(300 if size is None else size, len(a) - 1)
        value = partial(_relative, anchors=order[:n], others=order[n:])
    shuffled = (b[torch.randperm(len(b), generator=generator)] for _ in range(DRAWS))
    return Similarity(value(a, b), float(np.mean([value(a, c) for c in shuffled])))


def _jaccard(a: Tensor, b: Tensor, population: int | None) -> Similarity:
    """Of sets of rows; chance is that of random subsets of N: ``m / (n_a + n_b - m)`` with ``m = n_a n_b / N``."""
    for t in (a, b):
        if t.dim() != 2 or t.is_floating_point():
            raise InputError(f"jaccard compares (n, 2) integer names of atoms, not {t.dtype} of shape {tuple(t.shape)}")
    one, two = ({tuple(row) for row in t.tolist() if min(row) >= 0} for t in (a, b))
    if not one or not two:
        raise InputError(f"jaccard compares dictionaries that have atoms, not {len(one)} and {len(two)}")
    common = len(one & two)
    chance = float("nan")
    if population is not None:
        if population < len(one | two):
            raise InputError(f"population is {population}, the two dictionaries have {len(one | two)} atoms")
        expected = len(one) * len(two) / population
        chance = expected / (len(one) + len(two) - expected)
    return Similarity(common / len(one | two), chance)


def _rotation(d: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix, uniformly."""
    q, r = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))
    return q * r.diagonal().sign()


def _cka(a: Tensor, b: Tensor) -> float:
    """``||B'A||^2 / (||A'A|| ||B'B||)`` of centred columns, 0 where one side is constant."""
    a, b = a - a.mean(0), b - b.mean(0)
    scale = (a.T @ a).norm() * (b.T @ b).norm()
    return float((b.T @ a).square().sum() / scale.clamp(min=1e-300))


def _directions(x: Tensor, n: int) -> Tensor:
    """The n left singular vectors of largest singular value of centred columns, without those of rounding."""
    u, s, _ = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    return u[:, : min(n, int((s > 1e-9 * s[0]).sum()))]


def _svcca(a: Tensor, b: Tensor, components: int) -> float:
    """Mean of the singular values of ``U_a' U_b``, which are the canonical correlations of the two subspaces."""
    u, v = _directions(a, components), _directions(b, components)
    n = min(u.shape[1], v.shape[1])
    return float(torch.linalg.svdvals(u.T @ v).sum() / n) if n else 0.0


def _relative(a: Tensor, b: Tensor, anchors: Tensor, others: Tensor) -> float:
    """Mean over the other samples of the cosine of their two vectors of cosines with the anchors."""
    a, b = normalize(a, dim=1), normalize(b, dim=1)
    return float(torch.cosine_similarity(a[others] @ a[anchors].T, b[others] @ b[anchors].T, dim=1).mean())
