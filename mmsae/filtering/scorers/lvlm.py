"""SAE-V on a vision-language host: codes of both segments of a batch, and the scores that filtering ranks by."""

from __future__ import annotations

import torch
from torch import Tensor

from mmsae.filtering.scorers.clip import Evidence, ScorerSpec, only, pick_device
from mmsae.hosts import Backbone, load_backbone, named_host
from mmsae.lvlm.weights.file import load_weights
from mmsae.metrics.pairs.item_codes import content_rows, max_pool
from mmsae.metrics.pairs.sample_scores import SCORES, sample_scores
from mmsae.sae import SAE
from mmsae.sae.fingerprint import sae_fingerprint
from mmsae.types import IMAGE, TEXT, Codes, ImageTextBatch, InputError, Site, Tokens


def no_lvlm(host: str) -> InputError:
    """What is said of a host that has not both modalities in one sequence."""
    return InputError(f"host {host} is no vision-language model: its image and text tokens are no one sequence")


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
        raise no_lvlm(host.hint)
    if any(s.tokens.endswith(("mean", "pooled")) for s in sites.values()):
        raise InputError(f"this SAE reads {first}: scores of tokens need a site with tokens, not one row per item")
    if set(sites) != {IMAGE, TEXT}:
        sites = host.sites(f"{first.module}:{first.io}")
    return sites


def encode_tokens(sae: SAE, tokens: Tokens) -> dict[str, Codes]:
    """``{modality: codes}`` of both segments; an SAE of one modality encodes either with it."""
    only = sae.modalities[0]
    return {m: sae.encode(x, m if m in sae.modalities else only) for m, x in tokens.x.items()}


class TokenScorer:
    """Scores of image-text samples on a vision-language host.

    Args:
        host: The host.
        sae: An SAE on its tokens.
        weights: ``(d_sae,)`` cross-modal weights; without them the ``cos`` columns are left out.
        delta: Bound above which a latent is active (see :func:`mmsae.metrics.pairs.sample_scores.sample_scores`).
        allow_other_site: Accept an SAE that was trained on another host.

    Attributes:
        columns: What :meth:`score` returns.
    """

    def __init__(
        self,
        host: Backbone,
        sae: SAE,
        weights: Tensor | None = None,
        delta: float = 0.0,
        allow_other_site: bool = False,
    ):
        self.host, self.sae, self.delta = host, sae, delta
        self.sites = segment_sites(sae, host, allow_other_site)
        if weights is not None and len(weights) != sae.d_sae:
            raise InputError(f"there are {len(weights)} cross-modal weights for an SAE of {sae.d_sae} latents")
        self.weights = None if weights is None else weights.to(host.device)
        scores = [s for s in SCORES if weights is not None or not s.startswith("cos")]
        self.columns: tuple[str, ...] = (*scores, "n_image", "n_text")
        self._last: tuple[ImageTextBatch, Tokens, dict[str, Codes]] | None = None

    @torch.no_grad()
    def _read(self, batch: ImageTextBatch) -> tuple[Tokens, dict[str, Codes]]:
        if self._last is None or self._last[0] is not batch:
            tokens = self.host.capture(batch, self.sites)
            self._last = batch, tokens, encode_tokens(self.sae, tokens)
        return self._last[1:]

    def score(self, batch: ImageTextBatch) -> dict[str, Tensor]:
        """``{column: (B,) float64}`` of a batch of the host's own collate."""
        tokens, codes = self._read(batch)
        found = sample_scores(codes, tokens, self.weights, self.delta)
        return {c: found[c] for c in self.columns}

    def pooled(self, batch: ImageTextBatch) -> dict[str, Codes]:
        """``{modality: codes}``, one row a sample: the largest activation of each latent above ``delta``."""
        tokens, codes = self._read(batch)
        out = {}
        for m, c in codes.items():
            rows = content_rows(tokens, m).nonzero()[:, 0]
            out[m] = max_pool(c.rows(rows), tokens.item[m][rows]).above(self.delta).codes(len(batch.uids), m)
        return out


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
        host = load_backbone(named_host(spec.host, sae.sites, f"SAE {spec.sae}"), device, spec.precision)
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
