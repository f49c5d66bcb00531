"""Scores of image-text pairs under a CLIP-like host."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mmsae.filtering.pair_weights import PairWeights
from mmsae.filtering.scorers.base import ALWAYS, Reasons, ScorerSpec
from mmsae.hosts import as_encoder, pick_device
from mmsae.load import load_pair
from mmsae.sae.fingerprint import sae_fingerprint
from mmsae.types import IMAGE, TEXT, Codes, ImageTextBatch, InputError


class EncodedPairs(NamedTuple):
    """B pairs as the host and the SAE see them."""

    x: dict[str, Tensor]  #: ``{modality: (B, d)}`` embeddings in the host's joint space.
    codes: dict[str, Codes]  #: ``{modality: codes}``.


class PairReader:
    """A CLIP-like host and an SAE on it: batches to embeddings and codes.

    Raises:
        InputError: The SAE belongs to another host, has one modality only, or gives several rows a sample.
    """

    def __init__(self, spec: ScorerSpec, rank: int = 0) -> None:
        device = pick_device(spec.device, rank)
        sae, self.host = load_pair(spec.sae, spec.host, device, spec.precision, spec.other_site)
        as_encoder(self.host, "a pair score")
        for have, what in ((sae.modalities, f"SAE {spec.sae}"), (self.host.modalities, f"host {self.host.hint}")):
            if not {IMAGE, TEXT} <= set(have):
                raise InputError(f"{what} has {' and '.join(have)}; pair scores need image and text")
        self.sae, self.sites = sae.eval(), sae.sites
        self.embeds = {m: self.host.site(f"{m}.embed") for m in (IMAGE, TEXT)}
        self.device = torch.device(device).type
        self.fingerprints = {"sae": sae_fingerprint(self.sae), "host": self.host.fingerprint}

    @torch.no_grad()
    def read(self, batch: ImageTextBatch) -> EncodedPairs:
        """Embeddings and codes of a batch, from one forward pass of each encoder."""
        wanted = list(dict.fromkeys([*self.sites.values(), *self.embeds.values()]))
        rows = dict(zip(wanted, (r.x for r in self.host.read(batch, wanted)), strict=True))
        for site in self.sites.values():
            if len(rows[site]) != len(batch.uids):
                raise InputError(f"{site} gives {len(rows[site])} rows for {len(batch.uids)} samples; a pair needs one")
        # a sample that is not finite is left out by itself (not_finite)
        codes = {m: self.sae.encode(rows[self.sites[m]], m, finite=False) for m in (IMAGE, TEXT)}
        return EncodedPairs({m: rows[self.embeds[m]] for m in (IMAGE, TEXT)}, codes)


class ClipScorer:
    """Scores pairs under a CLIP-like host by fitted weights; a :class:`~mmsae.filtering.scorers.base.Scorer`."""

    def __init__(self, reader: PairReader, weights: str) -> None:
        self.reader, self.sae, self.host = reader, reader.sae, reader.host
        self.weights = PairWeights.load(weights).to(reader.host.device)
        self.columns = (*ALWAYS, *("pair_calibrated",) * (self.weights.calibrator is not None))
        self.fingerprints, self.device = reader.fingerprints, reader.device
        self._last: tuple[ImageTextBatch, EncodedPairs] | None = None

    def _read(self, batch: ImageTextBatch) -> EncodedPairs:
        if self._last is None or self._last[0] is not batch:
            self._last = batch, self.reader.read(batch)
        return self._last[1]

    @torch.no_grad()
    def score(self, batch: ImageTextBatch) -> dict[str, Tensor]:
        """Every score that the fitted weights allow."""
        x, codes = self._read(batch)
        scorer = self.weights.scorer
        out = scorer.embeddings(x[IMAGE], x[TEXT]) | scorer.codes(codes[IMAGE], codes[TEXT])
        if self.weights.calibrator is not None:
            out["pair_calibrated"] = self.weights.calibrator(codes[IMAGE], codes[TEXT], out)
        return out

    @torch.no_grad()
    def reasons(self, batch: ImageTextBatch) -> Reasons:
        """Concepts that image and text of each pair do not share."""
        return Reasons.of(self._read(batch).codes, self.weights.scorer.weights)
