"""Which patches of a picture does a vision-language model need? The patch filter of SAE-V (arXiv 2502.17514).

Every patch gets a score from the SAE's latents on its tokens; the best share stays, the others are painted black, and
the model is asked again. If a score knows what matters, the model answers better than with as many patches at random.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmsae.hosts import Host
from mmsae.lvlm.tokens import encode_tokens
from mmsae.metrics.pairs.item_codes import content_rows, entries
from mmsae.sae import SAE
from mmsae.shards import FaultLog, Sample, draw, place, taken
from mmsae.types import IMAGE, TEXT, Codes, ImageTextBatch, InputError, Site, Tokens

SCORES = ("cos", "l0", "l1", "co_l0", "norm", "random")
ALL = "all"


def shown_picture(host: Host, batch: ImageTextBatch, number: int, original: Image.Image) -> Image.Image:
    """The picture that the grid of a batch's image lies on.

    LLaVA's processor cuts the middle square out, so its own pixels are taken back to colours; the grids of LLaVA-NeXT
    and Qwen-VL cover the whole picture.
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


def token_scores(
    codes: Codes, weights: Tensor | None, partners: Tensor | None = None, delta: float = 0.0
) -> dict[str, Tensor]:
    """``{score: (N,)}`` of N image tokens.

    Args:
        codes: Of the tokens.
        weights: ``(d_sae,)`` cross-modal weights, NaN where there is none; without them there is no ``cos``.
        partners: ``(N, d_sae)`` bool, the latents that count for ``co_l0``: those that fire on the text beside each
            token's picture. (The published code takes one chosen set for all.)
        delta: A latent counts above this value.

    Returns:
        ``l0``: latents; ``l1``: their values; ``co_l0``: latents among the partners; ``cos``: their weights.
    """
    row, latent, value = entries(codes)
    on = value > delta
    row, latent, value = row[on], latent[on], value[on].double()

    def add(what: Tensor) -> Tensor:
        return torch.zeros(codes.n, dtype=torch.float64, device=value.device).index_add_(0, row, what)

    out = {"l0": add(torch.ones_like(value)), "l1": add(value)}
    if partners is not None:
        out["co_l0"] = add(partners[row, latent].double())
    if weights is not None:
        out["cos"] = add(weights.to(value.device).double().nan_to_num(0)[latent])
    return out


def kept_patches(scores: np.ndarray, keep: float, tie: np.ndarray) -> np.ndarray:
    """Bool mask of the best ``keep`` of all patches, rounded up; ``tie`` decides between equal scores.

    Published: all at or below the percentile go black, which is the same without ties; with ties (``l0`` of a TopK SAE
    is the same everywhere) it would leave too few, or none.
    """
    n = math.ceil(round(keep * scores.size, 9))
    mask = np.zeros(scores.size, dtype=bool)
    mask[np.lexsort((tie.ravel(), -scores.ravel()))[:n]] = True
    return mask.reshape(scores.shape)


def blacken(picture: Image.Image, kept: np.ndarray) -> Image.Image:
    """The picture with black in the cells of the grid ``kept (rows, cols)`` that are false."""
    pixels = np.array(picture.convert("RGB"))
    rows, cols = (np.arange(s) * k // s for s, k in zip(pixels.shape[:2], kept.shape, strict=True))
    pixels[~kept[rows[:, None], cols[None]]] = 0
    return Image.fromarray(pixels)


def is_right(said: str, wanted: str) -> bool:
    """Whether an answer begins with the words of the right one; case and punctuation do not matter."""
    a, b = ("".join(c if c.isalnum() else " " for c in text.lower()).split() for text in (said, wanted))
    return bool(b) and a[: len(b)] == b


class PatchFilter(NamedTuple):
    """What asks.

    Attributes:
        host: The host.
        sae: An SAE on its tokens.
        sites: Where both segments are read.
        weights: ``(d_sae,)`` cross-modal weights, or None.
        delta: A latent counts above this value.
        keep: Shares of the patches that stay.
        scores: Names of the scores.
        seed: Of ``random`` and of ties.
        max_new_tokens: Of an answer.
    """

    host: Host
    sae: SAE
    sites: dict[str, Site]
    weights: Tensor | None
    delta: float
    keep: Sequence[float]
    scores: Sequence[str]
    seed: int
    max_new_tokens: int

    def maps(self, batch: ImageTextBatch) -> list[dict[str, np.ndarray]]:
        """``{score: (rows, cols)}`` of every image; where a patch has two tokens (LLaVA-NeXT), their mean."""
        tokens: Tokens = self.host.capture(batch, self.sites)
        codes = encode_tokens(self.sae, tokens)
        text = content_rows(tokens, TEXT)
        said = torch.zeros(len(batch.uids), self.sae.d_sae, dtype=torch.bool, device=self.host.device)
        row, latent, value = entries(codes[TEXT])
        on = (value > self.delta) & text[row]
        said[tokens.item[TEXT][row[on]], latent[on]] = True
        found = token_scores(codes[IMAGE], self.weights, said[tokens.item[IMAGE]], self.delta)
        found["norm"] = tokens.x[IMAGE].double().norm(dim=1)  # the control that needs no SAE
        out = []
        for grid in self.host.grid(batch):
            place = tokens.position[IMAGE] - grid.start
            own = (tokens.item[IMAGE] == grid.item) & (place >= 0) & (place < grid.layout.length)
            empty = torch.zeros(grid.layout.length, dtype=torch.float64)
            maps = {
                name: grid.heat(empty.index_put((place[own].cpu(),), v[own].cpu())).numpy() for name, v in found.items()
            }
            rng = np.random.default_rng([self.seed, int(draw(batch.uids[grid.item]) * 2**31)])
            out.append(maps | {"random": rng.random(next(iter(maps.values())).shape)})
        return out

    @torch.no_grad()
    def ask(self, samples: Sequence[Sample], faults: FaultLog | None = None) -> dict[str, list[bool]]:
        """``{arm: was each answer right}``, arms ``all`` and ``SCORE/KEEP``; one image a sample.

        Args:
            samples: With decoded images.
            faults: Counts the samples that the host refuses, which are left out.
        """
        collate = self.host.collator("question")
        batch, samples = taken(collate, samples, FaultLog() if faults is None else faults, place)
        if batch is None:
            return {}
        grids = self.host.grid(batch)
        if len(grids) != len(samples):
            raise InputError(f"{len(samples)} samples have {len(grids)} images; the patch filter needs one each")
        maps = self.maps(batch)
        pictures = [shown_picture(self.host, batch, i, s.image) for i, s in enumerate(samples)]
        arms = {ALL: pictures}
        for name in self.scores:
            for share in self.keep:
                masks = [kept_patches(m[name], share, m["random"]) for m in maps]
                arms[f"{name}/{share:g}"] = [blacken(p, k) for p, k in zip(pictures, masks, strict=True)]
        out = {}
        for arm, shown in arms.items():
            painted = collate([s._replace(image=p) for s, p in zip(samples, shown, strict=True)])
            said = self.host.answer(painted, max_new_tokens=self.max_new_tokens)
            out[arm] = [is_right(a, str(s.meta["answer"])) for a, s in zip(said, samples, strict=True)]
        return out
