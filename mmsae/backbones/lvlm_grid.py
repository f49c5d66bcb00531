"""Where the image tokens of a vision-language sequence lie in the picture, by the processor's own arithmetic."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmsae.types import InputError


class Layout(NamedTuple):
    """The tokens of one image, counted from its first.

    Attributes:
        grids: One or two ``(rows, cols) int64`` arrays of token offsets. LLaVA-NeXT has two: the whole image (base) and
            the tiles at higher resolution, whose padding is cut off; other hosts have one.
        breaks: ``(r,) int64`` offsets of line-break tokens.
        length: Number of tokens.
    """

    grids: tuple[Tensor, ...]
    breaks: Tensor
    length: int


class ImageGrid(NamedTuple):
    """One image of a batch.

    Attributes:
        item: Which item of the batch.
        start: Position of its first token, as :class:`~mmsae.types.Tokens` counts positions.
        layout: Where its tokens lie.
    """

    item: int
    start: int
    layout: Layout

    def maps(self, values: Tensor) -> list[Tensor]:
        """``(rows, cols)`` pictures of ``values (length,)``, one per grid, base first."""
        return [values[g] for g in self.layout.grids]

    def heat(self, values: Tensor) -> Tensor:
        """``(rows, cols)`` of the base grid: the mean of base and tile values where there are tiles (SAE-V)."""
        base, *tiles = self.maps(values.float())
        if not tiles:
            return base
        fine = torch.nn.functional.adaptive_avg_pool2d(tiles[0][None], base.shape)[0]
        return (base + fine) / 2


def _plain(rows: int, cols: int, lead: int = 0) -> Layout:
    """A grid row by row after ``lead`` tokens of a class token."""
    grid = lead + torch.arange(rows * cols).view(rows, cols)
    return Layout((grid,), torch.empty(0, dtype=torch.long), lead + rows * cols)


def layouts(processor: Any, inputs: dict[str, Tensor]) -> list[Layout]:
    """The layout of every image of a batch, in the order of its images.

    Args:
        processor: Of LLaVA, LLaVA-NeXT or Qwen-VL (any that gives ``image_grid_thw``).
        inputs: What it returned.
    """
    if (thw := inputs.get("image_grid_thw")) is not None:
        m = processor.image_processor.merge_size
        return [_plain(t * h // m, w // m) for t, h, w in thw.tolist()]
    if (pixels := inputs.get("pixel_values")) is None:
        return []
    height, width = pixels.shape[-2:]
    rows, cols = height // processor.patch_size, width // processor.patch_size
    lead = processor.num_additional_image_tokens - (processor.vision_feature_select_strategy == "default")
    if (sizes := inputs.get("image_sizes")) is None:
        return [_plain(rows, cols, lead)] * len(pixels)
    return [_tiled(processor, size, (height, width), rows, cols, lead) for size in sizes.tolist()]


def _tiled(processor: Any, size: list[int], tile: tuple[int, int], rows: int, cols: int, lead: int) -> Layout:
    """LLaVA-NeXT: the whole image, then all tiles together row by row, a line break after each row."""
    from transformers.image_processing_utils import select_best_resolution

    best = select_best_resolution(size, processor.image_processor.image_grid_pinpoints)
    scale = best[0] // tile[0], best[1] // tile[1]
    cells, fine_rows = processor._get_unpadded_features(*size, rows, cols, *scale)
    base, fine_cols = _plain(rows, cols, lead), cells // fine_rows
    table = base.length + torch.arange(fine_rows * (fine_cols + 1)).view(fine_rows, fine_cols + 1)
    return Layout((*base.grids, table[:, :-1]), table[:, -1], base.length + table.numel())


def place(is_image: Tensor, attention: Tensor, found: list[Layout]) -> list[ImageGrid]:
    """Every image's place in its sequence.

    Args:
        is_image: ``(B, L) bool`` image tokens.
        attention: ``(B, L)`` 0 for padding.
        found: Layouts of the images, in the order of items and of images in them.

    Raises:
        InputError: A sequence has more or fewer image tokens than its images' layouts.
    """
    position, out, left = attention.long().cumsum(1) - 1, [], list(found)
    for item, row in enumerate(is_image):
        at = position[item][row].tolist()
        while at:
            layout = left.pop(0) if left else None
            if layout is None or layout.length > len(at):
                n = layout.length if layout else 0
                raise InputError(f"item {item} has {len(at)} image tokens left for an image whose grid has {n}.")
            out.append(ImageGrid(item, at[0], layout))
            at = at[layout.length :]
    if left:
        raise InputError(f"the batch has {len(found)} images, but tokens of {len(out)} only.")
    return out
