"""Single tokens of a vision-language model made visible: heat on the processor's own grid, words in their context."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmsae.hosts.lvlm.host import LVLMHost
from mmsae.hosts.lvlm.image_grid import ImageGrid
from mmsae.hosts.lvlm.tokens import ANSWER, QUESTION
from mmsae.hosts.tokenizer import token_pieces
from mmsae.lvlm.tokens import encode_tokens, shown_image
from mmsae.sae import SAE
from mmsae.shards import Sample
from mmsae.types import IMAGE, TEXT, Codes, InputError, Site, Tokens

CONTEXT = 8  # words before and behind a token


class LatentOnImage(NamedTuple):
    """A latent on one image."""

    shown: Image.Image  #: The image as the model sees it.
    heat: Tensor  #: ``(rows, cols)`` activations on the grid (base and tiles averaged where there are tiles).
    #: Left, upper, right and lower edge of the token's cell, as shares of the image.
    box: tuple[float, float, float, float]
    value: float  #: Activation of the token.


class LatentOnText(NamedTuple):
    """A latent on the words around one token."""

    words: list[str]  #: The tokens in order, with the white space before them.
    values: list[float]  #: Activation of each; 0 where it does not fire.
    at: int  #: Which of them it is about.


class TokenViewer:
    """Looks at tokens of one batch of samples with decoded images, which the host's ``collate`` makes."""

    def __init__(self, host: LVLMHost, sae: SAE, sites: dict[str, Site], collate: Any, samples: Sequence[Sample]):
        self.host, self.samples = host, list(samples)
        self.batch = collate(self.samples)
        with torch.no_grad():
            self.tokens: Tokens = host.capture(self.batch, sites)
            self.codes: dict[str, Codes] = encode_tokens(sae, self.tokens)
        self.grids: list[ImageGrid] = host.grid(self.batch)

    def _values(self, item: int, modality: str, latent: int) -> tuple[Tensor, Tensor]:
        """``(positions, activations)`` of one item's tokens."""
        rows = (self.tokens.item[modality] == item).nonzero()[:, 0]
        z = self.codes[modality].rows(rows).gather(torch.tensor([latent]))[:, 0]
        return self.tokens.position[modality][rows].cpu(), z.detach().float().cpu()

    def image(self, item: int, position: int, latent: int) -> LatentOnImage:
        """A latent on the image that has a token at ``position``.

        Raises:
            InputError: There is no image token.
        """
        at, z = self._values(item, IMAGE, latent)
        for number, grid in enumerate(self.grids):
            if grid.item == item and 0 <= position - grid.start < grid.layout.length:
                own = (at >= grid.start) & (at < grid.start + grid.layout.length)
                values = torch.zeros(grid.layout.length).index_put_((at[own] - grid.start,), z[own])
                heat = grid.heat(values)
                shown = shown_image(self.host, self.batch, number, self.samples[item].image)
                return LatentOnImage(shown, heat, _cell(grid, position), float(values[position - grid.start]))
        raise InputError(f"sample {self.samples[item].key} has no image token at position {position}")

    def text(self, item: int, position: int, latent: int) -> LatentOnText:
        """A latent on the content words around the token at ``position``."""
        at, z = self._values(item, TEXT, latent)
        kinds, mask = (self.batch.inputs[k][item].cpu() for k in ("kinds", "attention_mask"))
        place = mask.long().cumsum(0) - 1
        content = ((kinds == QUESTION) | (kinds == ANSWER)).nonzero()[:, 0]
        where = place[content]
        middle = int((where == position).nonzero()[0, 0])
        part = slice(max(0, middle - CONTEXT), middle + CONTEXT + 1)
        known = dict(zip(at.tolist(), z.tolist(), strict=True))
        ids = self.batch.inputs["input_ids"][item].cpu()[content]
        words = token_pieces(self.host.processor.tokenizer, ids.tolist())[part]
        return LatentOnText(words, [known.get(i, 0.0) for i in where[part].tolist()], middle - part.start)


def _cell(grid: ImageGrid, position: int) -> tuple[float, float, float, float]:
    """The cell of a token as shares of the image, in the grid that holds it."""
    for table in grid.layout.grids:
        hit = (table == position - grid.start).nonzero()
        if len(hit):
            (row, col), (rows, cols) = hit[0].tolist(), table.shape
            return col / cols, row / rows, (col + 1) / cols, (row + 1) / rows
    raise InputError(f"the token at position {position} is no patch of its image")


def heat_image(view: LatentOnImage, size: int = 144) -> Image.Image:
    """The image under the heat of its cells: 1st to 99th percentile, the stronger the redder."""
    heat = view.heat.numpy()
    low, high = np.percentile(heat, [1, 99])
    share = np.clip((heat - low) / (high - low), 0, 1) if high > low else (heat > low).astype(float)
    image = view.shown.resize((size, round(size * view.shown.height / view.shown.width)), Image.Resampling.NEAREST)
    alpha = Image.fromarray((share * 170).round().astype(np.uint8)).resize(image.size, Image.Resampling.NEAREST)
    grey = image.convert("L").convert("RGB")
    return Image.composite(Image.new("RGB", image.size, (235, 40, 30)), grey, alpha)


def crop_image(view: LatentOnImage, margin: float = 1.0, size: int = 72) -> Image.Image:
    """What is around the token: its cell and ``margin`` cells more on every side."""
    left, top, right, bottom = view.box
    w, h = margin * (right - left), margin * (bottom - top)
    edges = max(0, left - w), max(0, top - h), min(1, right + w), min(1, bottom + h)
    box = [round(e * s) for e, s in zip(edges, view.shown.size * 2, strict=True)]
    return view.shown.crop(box).resize((size, round(size * (box[3] - box[1]) / max(1, box[2] - box[0]))), Image.NEAREST)
