"""Correlation of every image latent with every text latent over pairs: what latents of two SAEs are matched by.

Modality-specific SAEs (arXiv 2606.29888); :func:`mmsae.sae.match_latents` takes the panel. Compare its matched values
with those of a panel of deranged pairs: the best of many partners is never at 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmsae.metrics.pairs.correlation import CrossCorrelation, pearson
from mmsae.types import Codes

_ENTRIES = 1 << 22  # products at a time


class CorrelationPanel(CrossCorrelation):
    """Signed Pearson correlation, over pairs, of each image latent's value with each text latent's.

    One streaming pass with float64 sums, added over ranks; ``8 * d_sae ** 2`` bytes, whatever the number of pairs. Use
    all training pairs, and one panel for every evaluation: a matching of its own for each test set inflates results.
    """

    def __init__(self, d_sae: int, **kwargs):
        super().__init__(d_sae, **kwargs)
        self.add_state("cross", torch.zeros(d_sae, d_sae, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, image: Codes, text: Codes) -> None:
        """Add one batch; row i of each side belongs to one pair."""
        super().update(image, text)
        if image.indices is None or text.indices is None:
            self.cross.addmm_(image.to_dense().detach().double().T, text.to_dense().detach().double())
            return
        cross, d_sae = self.cross.view(-1), image.d_sae  # d_sae^2 numbers: added to where they are
        step = max(1, _ENTRIES // max(1, image.values.shape[1] * text.values.shape[1]))
        for lo in range(0, image.n, step):
            a, b = (c.rows(slice(lo, lo + step)) for c in (image, text))
            at = a.indices[:, :, None] * d_sae + b.indices[:, None, :]
            product = a.values.detach().double()[:, :, None] * b.values.detach().double()[:, None, :]
            cross.index_add_(0, at.flatten(), product.flatten())

    def compute(self) -> Tensor:
        """``(d_sae, d_sae)`` float64, image latents by text latents; NaN where one of the two never varied."""
        a, aa = self.sum_a[:, None], self.sum_aa[:, None]
        return pearson(self.n, a, self.sum_b, aa, self.sum_bb, self.cross)
