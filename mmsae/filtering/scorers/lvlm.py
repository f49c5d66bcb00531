"""SAE-V's scores of samples under a vision-language host, as a scorer of ``mmsae filter``."""

from __future__ import annotations

import torch

from mmsae.filtering.scorers.base import Reasons, ScorerSpec
from mmsae.hosts import pick_device
from mmsae.load import load_pair
from mmsae.lvlm.tokens import TokenScorer
from mmsae.lvlm.weights.file import load_weights
from mmsae.sae.fingerprint import sae_fingerprint
from mmsae.types import ImageTextBatch, InputError


class SaeVScorer(TokenScorer):
    """A :class:`~mmsae.filtering.scorers.base.Scorer` of tokens, on the device of process ``rank``."""

    def __init__(self, spec: ScorerSpec, rank: int = 0):
        device = pick_device(spec.device, rank)
        sae, host = load_pair(spec.sae, spec.host, device, spec.precision, spec.other_site)
        file = load_weights(spec.weights) if spec.weights else None
        self.fingerprints = {"sae": sae_fingerprint(sae), "host": host.fingerprint}
        if file is not None:
            file.check(sae, host.fingerprint)
        super().__init__(host, sae.eval(), file and file.weights, file.delta if file else 0.0, spec.other_site)
        if spec.score not in (*self.columns, "random"):
            raise InputError(f"score {spec.score} needs cross-modal weights: give the folder that mmsae weights wrote")
        self.device = torch.device(device).type

    def reasons(self, batch: ImageTextBatch) -> Reasons:
        """Latents that text and image of each sample do not share, by their part in its code and their weight."""
        ones = torch.ones(self.sae.d_sae, device=self.host.device)
        weights = ones if self.weights is None else self.weights.nan_to_num(0).clamp(min=0).to(ones)
        return Reasons.of(self.pooled(batch), weights)
