"""Samples by their images alone: for an SAE that reads no text, say of a host without a text tower.

There is nothing to compare an image with, so that samples are chosen by a query over the concepts of the image, or at
random; captions are not asked for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmsae.filtering.scorers.base import Only, Reasons, ScorerSpec, only
from mmsae.hosts import pick_device
from mmsae.load import load_pair
from mmsae.metrics.pairs.item_codes import max_pool
from mmsae.sae.fingerprint import sae_fingerprint
from mmsae.types import IMAGE, TEXT, Codes, ImageTextBatch


class ImageScorer:
    """What the images of samples hold; a :class:`~mmsae.filtering.scorers.base.Scorer`.

    At a site of tokens an image's code is the largest value of each latent over its content tokens.
    """

    columns = ("latents_on",)

    def __init__(self, spec: ScorerSpec, rank: int = 0) -> None:
        device = pick_device(spec.device, rank)
        sae, self.host = load_pair(spec.sae, spec.host, device, spec.precision, spec.other_site)
        self.sae, self.site = sae.eval(), sae.sites[IMAGE]
        self.device = torch.device(device).type
        self.fingerprints = {"sae": sae_fingerprint(self.sae), "host": self.host.fingerprint}
        self._last: tuple[ImageTextBatch, Codes] | None = None

    def _codes(self, batch: ImageTextBatch) -> Codes:
        """One row a sample, kept for the last batch."""
        if self._last is None or self._last[0] is not batch:
            self._last = batch, self._read(batch)
        return self._last[1]

    @torch.no_grad()
    def _read(self, batch: ImageTextBatch) -> Codes:
        (rows,) = self.host.read(batch, [self.site])
        keep = slice(None) if rows.special is None else ~rows.special
        # a sample that is not finite is left out by itself (not_finite)
        return max_pool(self.sae.encode(rows.x[keep], IMAGE, finite=False), rows.item[keep]).codes(
            len(batch.uids), IMAGE
        )

    def score(self, batch: ImageTextBatch) -> dict[str, Tensor]:
        """How many latents are on anywhere in the image; not finite where the code is not."""
        z = self._codes(batch)
        return {"latents_on": z.l0() + 0 * z.values.sum(1)}

    def reasons(self, batch: ImageTextBatch) -> Reasons:
        """The strongest concepts of the image, as those that only it has."""
        z = self._codes(batch)
        none = Codes(torch.zeros_like(z.values[:, :1]), z.indices[:, :1], z.d_sae, TEXT)
        nothing = Only(z.indices[:, :0], z.values[:, :0])
        return Reasons(nothing, only(z, none, torch.ones(z.d_sae, device=z.values.device)), {}, {IMAGE: z})
