"""Where a host looks in an image: its transform is shown coordinates in place of colours, and gives them back.

So the box is that of the transform that really runs, whatever it resizes, crops, squeezes or pads, with no list of
transforms to keep.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

LOW, HIGH = 32, 224  # levels that stand for the first and the last column: away from what is clipped
INSIDE = 250  # blue of what is image; padding is black, grey or of the data's mean colour
MOST = 512  # pixels a side of what is shown: boxes depend on the shape of an image
WHOLE = (0.0, 0.0, 1.0, 1.0)


class Views:
    """Boxes by the size of images; each size is tried once.

    Args:
        transform: PIL image to ``(3, H, W)`` levels or normalised values; None: the host sees images whole.
    """

    def __init__(self, transform: Callable[[Image.Image], Tensor] | None) -> None:
        self.transform = transform
        self._known: dict[tuple[int, int], tuple[float, float, float, float]] = {}

    def __call__(self, width: int, height: int) -> tuple[float, float, float, float]:
        """Left, top, right and bottom of the host's view, as shares of the image; beyond 0 and 1 where it is padded."""
        if self.transform is None:
            return WHOLE
        scale = MOST / max(width, height)
        size = (width, height) if scale >= 1 else (max(1, round(width * scale)), max(1, round(height * scale)))
        if size not in self._known:
            self._known[size] = view_box(self.transform, *size)
        return self._known[size]


def coordinates(width: int, height: int) -> Image.Image:
    """An image whose red says the column and whose green says the row of a pixel; its blue is full."""
    red, green = (np.rint(LOW + (HIGH - LOW) * (np.arange(n) + 0.5) / n) for n in (width, height))
    out = np.full((height, width, 3), 255, np.uint8)
    out[..., 0], out[..., 1] = red[None], green[:, None]
    return Image.fromarray(out)


def view_box(transform: Callable[[Image.Image], Tensor], width: int, height: int) -> tuple[float, float, float, float]:
    """The box that a transform shows of an image of this size; the whole where its pixels do not tell."""
    made = transform(coordinates(width, height)).float()
    if made.dim() != 3 or len(made) != 3:
        return WHOLE
    blank = [transform(Image.new("RGB", (width, height), (level,) * 3)).float() for level in (0, 255)]
    middle = tuple(s // 2 for s in made.shape[1:])
    dark, light = (b[:, middle[0], middle[1]].view(3, 1, 1) for b in blank)
    if torch.equal(dark, light):
        return WHOLE
    levels = ((made - dark) / (light - dark) * 255).numpy()
    inside = levels[2] > INSIDE
    box = []
    for axis in (1, 0):  # columns by red, rows by green
        share = (levels[1 - axis] - LOW) / (HIGH - LOW)
        n = share.shape[axis]
        at = np.broadcast_to(((np.arange(n) + 0.5) / n).reshape((1, n) if axis else (n, 1)), share.shape)
        keep = inside & (share > 1 / 64) & (share < 1 - 1 / 64)  # interpolation bends what is at the edges
        if len(np.unique(at[keep])) < 2:
            return WHOLE
        slope, first = np.polyfit(at[keep], share[keep], 1)
        box.append((float(first), float(first + slope)))
    (left, right), (top, bottom) = box
    return left, top, right, bottom


class ProcessorPixels:
    """What the processor of a vision-language host makes of an image, for :class:`Views`.

    Processors whose tokens cover the whole image (tiles of LLaVA-NeXT, Qwen-VL) give no plain image and no box.

    Args:
        collate: The host's.
    """

    def __init__(self, collate: Any) -> None:
        self.collate = collate

    def __call__(self, image: Image.Image) -> Tensor:
        inputs = self.collate.batch(["?"], [image]).inputs
        pixels = inputs["pixel_values"]
        return torch.zeros(0) if pixels.dim() != 4 or "image_sizes" in inputs else pixels[0]
