"""Tokens of a vision-language host under an SAE: where they are read, their codes and image, scores of samples."""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor

from mmsae.hosts import Answers, parse
from mmsae.load import named_pair
from mmsae.metrics.pairs.item_codes import content_rows, max_pool
from mmsae.metrics.pairs.sample_scores import SCORES, sample_scores
from mmsae.sae import SAE
from mmsae.types import IMAGE, TEXT, Codes, ImageTextBatch, InputError, Site, Tokens


def no_lvlm(host: str) -> InputError:
    """What is said of a host that has not both modalities in one sequence."""
    return InputError(f"host {host} is no vision-language model: its image and text tokens are no one sequence")


def named_lvlm(sae: str, host: str) -> tuple[SAE, str]:
    """An SAE and the name of its vision-language host; a host of another kind is refused before it is looked for."""
    model, name = named_pair(sae, host)
    if parse(name).kind != "lvlm":
        raise no_lvlm(name)
    return model, name


def segment_sites(sae: SAE, host: Answers, allow_other_site: bool = False) -> dict[str, Site]:
    """Where the image tokens and the text tokens of an SAE on mixed tokens are read.

    An SAE of one modality (imported from a library that knows none) reads both segments of its module.

    Raises:
        InputError: The SAE was trained on another host or width (unless allowed), or on one row per item.
    """
    if not isinstance(host, Answers):
        raise no_lvlm(host.hint)
    sae.attach(host, allow_other_site)
    sites = {m: host.site(s, allow_other_site=allow_other_site) for m, s in sae.sites.items()}
    first = next(iter(sites.values()))
    if any(s.tokens.endswith(("mean", "pooled")) for s in sites.values()):
        raise InputError(f"this SAE reads {first}: scores of tokens need a site with tokens, not one row per item")
    if set(sites) != {IMAGE, TEXT}:
        sites = host.sites(f"{first.module}:{first.io}")
    return sites


def encode_tokens(sae: SAE, tokens: Tokens) -> dict[str, Codes]:
    """``{modality: codes}`` of both segments; an SAE of one modality encodes either with it."""
    only = sae.modalities[0]
    # jobs leave out samples that are not finite by themselves
    return {m: sae.encode(x, m if m in sae.modalities else only, finite=False) for m, x in tokens.x.items()}


def shown_image(host: Answers, batch: ImageTextBatch, number: int, original: Image.Image) -> Image.Image:
    """The image that the grid of a batch's image lies on.

    LLaVA's processor cuts the middle square out, so its own pixels are taken back to colours; the grids of LLaVA-NeXT
    and Qwen-VL cover the whole image.
    """
    pixels = batch.inputs["pixel_values"]
    if pixels.dim() != 4 or "image_sizes" in batch.inputs:
        return original.convert("RGB")
    p = host.processor.image_processor
    x = pixels[number].float().cpu()
    if p.do_normalize:
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (p.image_mean, p.image_std))
        x = x * std + mean
    if p.do_rescale:
        x = x / (p.rescale_factor * 255)
    return Image.fromarray((x.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())


class TokenScorer:
    """Scores of image-text samples on a vision-language host; ``columns`` are what :meth:`score` returns.

    Without cross-modal ``weights (d_sae,)`` the ``cos`` columns are left out. A latent is active above ``delta`` (see
    :func:`mmsae.metrics.pairs.sample_scores.sample_scores`).
    """

    def __init__(
        self, host: Answers, sae: SAE, weights: Tensor | None = None, delta: float = 0.0, allow_other_site: bool = False
    ):
        self.host = host
        self.sae, self.delta = sae, delta
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
