"""Where the image tokens of a vision-language sequence lie in the image, by the processor's own arithmetic."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmsae.hosts.lvlm.families import check_family, frame, is_llava, is_qwen, squares
from mmsae.types import InputError


class ImageLayout(NamedTuple):
    """The tokens of one image, counted from its first."""

    #: One or two ``(rows, cols) int64`` arrays of token offsets. LLaVA-NeXT has two: the whole image (base) and the
    #: tiles at higher resolution, whose padding is cut off; other hosts have one.
    grids: tuple[Tensor, ...]
    breaks: Tensor  #: ``(r,) int64`` offsets of line-break tokens.
    length: int  #: Number of tokens.


class ImageGrid(NamedTuple):
    """One image of a batch."""

    item: int  #: Which item of the batch.
    start: int  #: Position of its first token, as :class:`~mmsae.types.Tokens` counts positions.
    layout: ImageLayout

    def maps(self, values: Tensor) -> list[Tensor]:
        """``(rows, cols)`` maps of ``values (length,)``, one per grid, base first."""
        return [values[g] for g in self.layout.grids]

    def heat(self, values: Tensor) -> Tensor:
        """``(rows, cols)`` of the base grid: the mean of base and tile values where there are tiles (SAE-V)."""
        base, *tiles = self.maps(values.float())
        if not tiles:
            return base
        fine = torch.nn.functional.adaptive_avg_pool2d(tiles[0][None], base.shape)[0]
        return (base + fine) / 2


def _plain(rows: int, cols: int, lead: int = 0) -> ImageLayout:
    """A grid row by row after ``lead`` tokens of a class token."""
    grid = lead + torch.arange(rows * cols).view(rows, cols)
    return ImageLayout((grid,), torch.empty(0, dtype=torch.long), lead + rows * cols)


def image_id(processor: Any) -> int:
    """Id of the token that images become."""
    own = getattr(processor.tokenizer, "image_token_id", None)  # Gemma's processor names another, the placeholder
    return processor.image_token_id if own is None else own


def layouts(processor: Any, inputs: dict[str, Tensor]) -> list[ImageLayout]:
    """The layout of every image of a batch, in their order, from what the processor returned as ``inputs``.

    The processor is that of a family of :mod:`mmsae.hosts.lvlm.families`.
    """
    if (square := frame(processor, "")).tokens is not None:
        ids = inputs["input_ids"]
        n = int((ids == image_id(processor)).sum())
        return [_plain(square.side, square.side)] * (n // square.tokens)
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


def _tiled(processor: Any, size: list[int], tile: tuple[int, int], rows: int, cols: int, lead: int) -> ImageLayout:
    """LLaVA-NeXT: the whole image, then all tiles together row by row, a line break after each row."""
    from transformers.image_processing_utils import select_best_resolution

    best = select_best_resolution(size, processor.image_processor.image_grid_pinpoints)
    scale = best[0] // tile[0], best[1] // tile[1]
    cells, fine_rows = processor._get_unpadded_features(*size, rows, cols, *scale)
    base, fine_cols = _plain(rows, cols, lead), cells // fine_rows
    table = base.length + torch.arange(fine_rows * (fine_cols + 1)).view(fine_rows, fine_cols + 1)
    return ImageLayout((*base.grids, table[:, :-1]), table[:, -1], base.length + table.numel())


def has_cls(model: nn.Module) -> bool:
    """Whether a vision tower puts a class token before its patches."""
    return any(name.endswith(("class_embedding", "cls_token")) for name, _ in model.named_parameters())


def check_processor(processor: Any, model: nn.Module, name: str) -> None:
    """Refuse families whose image tokens cannot be placed here, and a processor that disagrees with its model."""
    check_family(processor, model, name)
    config, images, vision = model.config, processor.image_processor, model.config.vision_config
    if not (is_qwen(processor) or is_llava(processor)):
        pairs = squares(processor, model)
    elif is_qwen(processor):
        pairs = {"patch_size": (images.patch_size, vision.patch_size)}
        pairs["merge_size"] = images.merge_size, getattr(vision, "spatial_merge_size", images.merge_size)
    else:
        extra = has_cls(model)
        strategy = getattr(config, "vision_feature_select_strategy", processor.vision_feature_select_strategy)
        pairs = {"patch_size": (processor.patch_size, getattr(vision, "patch_size", processor.patch_size))}
        pairs["vision_feature_select_strategy"] = processor.vision_feature_select_strategy, strategy
        pairs["num_additional_image_tokens"] = processor.num_additional_image_tokens, int(extra)
        side, size = getattr(vision, "image_size", None), _side(images)
        if isinstance(side, int) and size is not None:
            pairs["size"] = size, side
    for field, (theirs, ours) in pairs.items():
        if theirs != ours:
            raise InputError(
                f"host {name}: {field} is {theirs} in processor_config.json (or preprocessor_config.json), but {ours} "
                "in the model, so image tokens and image features would not be equally many."
            )


def _side(images: Any) -> int | None:
    """Pixels a side of what an image processor gives; None where that is no one number."""
    size = (getattr(images, "do_center_crop", False) and getattr(images, "crop_size", None)) or images.size
    sides = {size.get(k) for k in ("height", "width", "shortest_edge")} - {None}
    return sides.pop() if len(sides) == 1 else None


def place(is_image: Tensor, attention: Tensor, found: list[ImageLayout]) -> list[ImageGrid]:
    """Every image's place in its sequence.

    Args:
        is_image: ``(B, L) bool`` image tokens.
        attention: ``(B, L)`` 0 for padding.
        found: Layouts of the images, in the order of items and of images in them.
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
