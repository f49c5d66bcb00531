"""Whose latent is it: modality index, classes, and whether image and text of one pair fire together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from mmsae.metrics.pairs.item_codes import check_rows, content_rows, max_pool
from mmsae.types import IMAGE, TEXT, Codes, Tokens

CLASSES = ("dead", IMAGE, TEXT, "shared")


def modality_index(image: Tensor, text: Tensor) -> Tensor:
    """``(d_sae,)`` float64 ``(image - text) / (image + text)`` in [-1, 1]; NaN where both are 0.

    The sides are ``(d_sae,)`` firing rates on tokens, or (energy version) mean activations over them.
    """
    image, text = image.double(), text.double()
    return (image - text) / (image + text)  # 0 / 0 is the NaN that is promised


def modality_class(index: Tensor, bound: float = 0.9) -> Tensor:
    """``(d_sae,)`` int64 positions in ``CLASSES``: image above ``bound``, text below ``-bound``, shared between."""
    out = torch.full_like(index, CLASSES.index("shared"), dtype=torch.long)
    out[index > bound] = CLASSES.index(IMAGE)
    out[index < -bound] = CLASSES.index(TEXT)
    out[index.isnan()] = CLASSES.index("dead")
    return out


class Lift(NamedTuple):
    """What :class:`CoActivation` computes."""

    #: ``(d_sae,)`` float64 pairs whose image and text both fire, over the number expected when captions are shuffled;
    #: NaN for latents that never fire on one side. 1 is independence.
    lift: Tensor
    #: ``(d_sae,)`` float64 share of all shuffles that have at least as many such pairs (exact, one-sided; 1 for
    #: latents that never fire on one side)
    p: Tensor
    both: Tensor  #: ``(d_sae,)`` int64 pairs whose image and text both fire
    image: Tensor  #: ``(d_sae,)`` int64 pairs whose image does
    text: Tensor  #: ``(d_sae,)`` int64 pairs whose text does
    items: int  #: Pairs seen

    def summary(self, shared: Tensor, bound: float = 2.0) -> dict[str, float]:
        """Share of latents that are ``shared`` (mask), and share that are shared with a lift above ``bound``."""
        return {
            "shared": shared.double().mean().item(),
            "shared_lifted": (shared & (self.lift > bound)).double().mean().item(),
        }


def overlap_p_value(both: Tensor, image: Tensor, text: Tensor, items: int) -> Tensor:
    """``(d_sae,)`` ``P(X >= both)`` for the overlap X of two random sets of ``image`` and ``text`` among ``items``.

    That is what shuffling captions does to the number of pairs whose sides both fire, so no shuffles are drawn: X is
    hypergeometric. Terms are added upwards from ``both``, each from the one before.
    """
    k, a, b = both.double(), image.double(), text.double()
    n = torch.tensor(float(items), dtype=torch.float64, device=k.device)

    def choose(top: Tensor, of: Tensor) -> Tensor:
        return torch.lgamma(top + 1) - torch.lgamma(of + 1) - torch.lgamma(top - of + 1)

    term = (choose(a, k) + choose(n - a, b - k) - choose(n, b)).exp()
    total, most = term.clone(), torch.minimum(a, b)
    while bool(((k < most) & (term > total * 1e-17)).any()):
        term = term * (a - k).clamp(min=0) * (b - k).clamp(min=0) / ((k + 1) * (n - a - b + k + 1).clamp(min=1))
        k = k + 1
        total = total + term
    # from the smallest overlap that can be, the sum is 1 by definition
    return torch.where(both <= (image + text - items).clamp(min=0), 1.0, total.clamp(max=1.0))


class CoActivation(Metric):
    """Lift of every latent over pairs; streaming integer counts, exact over ranks.

    A latent fires on an item where it is above ``delta`` on one of its content tokens.
    """

    full_state_update = False

    def __init__(self, d_sae: int, delta: float = 0.0, **kwargs):
        super().__init__(**kwargs)
        self.d_sae, self.delta = d_sae, delta
        self.add_state("items", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        for name in ("image", "text", "both"):
            self.add_state(name, torch.zeros(d_sae, dtype=torch.long), dist_reduce_fx="sum")

    @torch.no_grad()
    def update(self, codes: Mapping[str, Codes], tokens: Tokens) -> None:
        """Add one batch; items that have content tokens of both modalities are the pairs."""
        rows, present = {}, []
        for m in (IMAGE, TEXT):
            check_rows(codes[m], tokens, m)
            rows[m] = content_rows(tokens, m).nonzero()[:, 0]
            present.append(torch.bincount(tokens.item[m][rows[m]], minlength=len(tokens.uids)) > 0)
        pair = present[0] & present[1]
        pooled = {}
        for m in (IMAGE, TEXT):
            own = rows[m][pair[tokens.item[m][rows[m]]]]
            pooled[m] = max_pool(codes[m].rows(own), tokens.item[m][own]).above(self.delta)
        self.items += pair.sum()
        self.image += torch.bincount(pooled[IMAGE].latent, minlength=self.d_sae)
        self.text += torch.bincount(pooled[TEXT].latent, minlength=self.d_sae)
        common = pooled[IMAGE].common(pooled[TEXT])[0]
        self.both += torch.bincount(pooled[IMAGE].latent[common], minlength=self.d_sae)

    def part(self) -> dict[str, Tensor]:
        """What was seen, for a file; :meth:`merge` takes it."""
        return {name: getattr(self, name).clone() for name in ("items", "image", "text", "both")}

    def merge(self, part: Mapping[str, Tensor]) -> None:
        """Add what another metric of the same size has seen."""
        self._update_count += 1
        for name in ("items", "image", "text", "both"):
            getattr(self, name).add_(part[name].to(self.both.device))

    def compute(self) -> Lift:
        """Lift over everything that all ranks have seen."""
        n = int(self.items)
        lift = self.both.double() * n / (self.image.double() * self.text.double())
        p = overlap_p_value(self.both, self.image, self.text, n)
        never = (self.image == 0) | (self.text == 0)
        return Lift(torch.where(never, torch.nan, lift), p, self.both, self.image, self.text, n)
