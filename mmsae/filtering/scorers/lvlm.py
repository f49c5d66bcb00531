"""SAE-V on a vision-language host, as a scorer of ``mmsae filter``."""

from __future__ import annotations

import torch

from mmsae.filtering.scorers.clip import Evidence, ScorerSpec, only
from mmsae.hosts import load_host, named_host, pick_device
from mmsae.lvlm.tokens import TokenScorer
from mmsae.lvlm.weights.file import load_weights
from mmsae.sae import SAE
from mmsae.sae.fingerprint import sae_fingerprint
from mmsae.types import IMAGE, TEXT, ImageTextBatch, InputError


class SaeVScorer(TokenScorer):
    """The scorer of ``mmsae filter`` for vision-language hosts.

    Args:
        spec: What to load; ``weights`` is a folder that ``mmsae weights`` wrote, or empty.
        rank: Of this process, for its device.

    Attributes:
        collate: Samples to batches, in the decoding workers; takes the place of ``transform`` and ``tokenize``.
    """

    transform = tokenize = None

    def __init__(self, spec: ScorerSpec, rank: int = 0):
        device = pick_device(spec.device, rank)
        sae = SAE.from_pretrained(spec.sae, device).eval()
        host = load_host(named_host(spec.host, sae.sites, f"SAE {spec.sae}"), device, spec.precision)
        file = load_weights(spec.weights) if spec.weights else None
        self.fingerprints = {"sae": sae_fingerprint(sae), "host": host.fingerprint}
        if file is not None:
            file.check(sae, host.fingerprint)
        super().__init__(host, sae, file and file.weights, file.delta if file else 0.0, spec.other_site)
        if spec.score not in self.columns:
            raise InputError(f"score {spec.score} needs cross-modal weights: give the folder that mmsae weights wrote")
        self.name, self.device, self.collate = spec.score, torch.device(device).type, host.collator(spec.text)

    def evidence(self, batch: ImageTextBatch) -> Evidence:
        """Latents that text and image of each sample do not share, by their part in its code and their weight."""
        codes = self.pooled(batch)
        ones = torch.ones(self.sae.d_sae, device=self.host.device)
        w = ones if self.weights is None else self.weights.nan_to_num(0).clamp(min=0).to(ones)
        counts = {f"l0_{m}": codes[m].l0() for m in (IMAGE, TEXT)}
        return Evidence(only(codes[TEXT], codes[IMAGE], w), only(codes[IMAGE], codes[TEXT], w), counts, codes)
