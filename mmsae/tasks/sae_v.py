"""SAE-V on a vision-language host: codes of both segments of a batch, and the scores that filtering ranks by."""

from __future__ import annotations

import torch
from torch import Tensor

from mmsae.backbones import Backbone
from mmsae.backbones.fingerprint import fingerprint
from mmsae.metrics.sample_scores import SCORES, sample_scores
from mmsae.sae import SAE
from mmsae.sae.io import config
from mmsae.types import IMAGE, TEXT, Codes, ImageTextBatch, InputError, Site, Tokens


def segment_sites(sae: SAE, host: Backbone, allow_other_site: bool = False) -> dict[str, Site]:
    """Where the image tokens and the text tokens of an SAE on mixed tokens are read.

    An SAE of one modality (imported from a library that knows none) reads both segments of its module.

    Raises:
        InputError: The SAE was trained on another host or width (unless allowed), or on one row per item.
    """
    sae.attach(host, allow_other_site)
    sites = {m: host.site(s, allow_mismatch=allow_other_site) for m, s in sae.sites.items()}
    first = next(iter(sites.values()))
    if not hasattr(host, "sites"):
        raise InputError(f"host {host.hint} is no vision-language model: its image and text tokens are no one sequence")
    if any(s.tokens.endswith(("mean", "pooled")) for s in sites.values()):
        raise InputError(f"this SAE reads {first}: scores of tokens need a site with tokens, not one row per item")
    if set(sites) != {IMAGE, TEXT}:
        sites = host.sites(f"{first.module}:{first.io}")
    return sites


def encode_tokens(sae: SAE, tokens: Tokens) -> dict[str, Codes]:
    """``{modality: codes}`` of both segments; an SAE of one modality encodes either with it."""
    only = sae.modalities[0]
    return {m: sae.encode(x, m if m in sae.modalities else only) for m, x in tokens.x.items()}


def sae_fingerprint(sae: SAE) -> str:
    """32 hex digits of what an SAE computes: parts, sizes, sites and tensors; not of its training record."""
    block = {k: v for k, v in config(sae)["mmsae"].items() if k not in ("version", "training")}
    return fingerprint(block, sae.state_dict())


class SAEVScorer:
    """Scores of image-text samples on a vision-language host, for ``mmsae filter``.

    Args:
        host: The host.
        sae: An SAE on its tokens.
        weights: ``(d_sae,)`` cross-modal weights; without them the ``cos`` columns are left out.
        delta: Bound above which a latent is active (see :func:`mmsae.metrics.sample_scores.sample_scores`).
        allow_other_site: Accept an SAE that was trained on another host.

    Attributes:
        name: Of the family of scores.
        columns: What :meth:`score` returns.
    """

    name = "sae_v"

    def __init__(
        self,
        host: Backbone,
        sae: SAE,
        weights: Tensor | None = None,
        delta: float = 0.0,
        allow_other_site: bool = False,
    ):
        self.host, self.sae, self.weights, self.delta = host, sae, weights, delta
        self.sites = segment_sites(sae, host, allow_other_site)
        if weights is not None and len(weights) != sae.d_sae:
            raise InputError(f"there are {len(weights)} cross-modal weights for an SAE of {sae.d_sae} latents")
        scores = [s for s in SCORES if weights is not None or not s.startswith("cos")]
        self.columns = (*scores, "n_image", "n_text")

    @torch.no_grad()
    def score(self, batch: ImageTextBatch) -> dict[str, Tensor]:
        """``{column: (B,) float64}`` of a batch of the host's own collate."""
        tokens = self.host.capture(batch, self.sites)
        found = sample_scores(encode_tokens(self.sae, tokens), tokens, self.weights, self.delta)
        return {c: found[c] for c in self.columns}
