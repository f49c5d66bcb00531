"""Items as a model or a person is shown them: images with heat and crops, captions with marked tokens."""

from __future__ import annotations

import io
from functools import cached_property
from typing import Any

import numpy as np

from mmsae.interpret.evidence.folder import Evidence
from mmsae.types import IMAGE, TEXT

MARKED = 0.3  # share of an example's largest value above which a token is marked
COLOUR, OPACITY = (255, 40, 0), 0.6
LEFT, RIGHT = "<<", ">>"


def encoded(image: Any, kind: str = "PNG") -> bytes:
    """A PIL image as bytes."""
    out = io.BytesIO()
    image.save(out, kind)
    return out.getvalue()


class ItemViews:
    """How the items of a folder of evidence look to a latent.

    Args:
        evidence: The folder.
        modality: Whose rows heat and marks are of.
    """

    def __init__(self, evidence: Evidence, modality: str):
        self.ev, self.modality = evidence, modality

    @cached_property
    def places(self) -> bool:
        """Whether a latent has places in an item: patches of an image, or tokens of a text that are known by word."""
        if self.ev.grid(self.modality).places <= 1:
            return False
        items = self.ev.top(self.modality).item
        known = items[items >= 0][:1].tolist()
        return self.modality == IMAGE or any(self.ev.words(i, TEXT) is not None for i in known)

    def image(self, item: int) -> Any:
        """The small image of an item (PIL, RGB), or None."""
        from PIL import Image

        data = self.ev.thumbnail(int(item))
        return None if data is None else Image.open(io.BytesIO(data)).convert("RGB")

    def plain(self, item: int) -> tuple[str, bytes | None]:
        """``(text, image)`` of an item as it is, in the latent's modality."""
        if self.modality == TEXT:
            return self.ev.items.caption[int(item)], None
        found = self.image(item)
        return "", None if found is None else encoded(found)

    def marked(self, item: int, latent: int, wrong: bool = False) -> tuple[str, bytes | None]:
        """The same with the places marked where the latent is strong.

        ``wrong`` marks as many places elsewhere: the heat-map moved by half of the grid, tokens by half of the text.
        """
        item = int(item)
        if self.modality == TEXT:
            return self._marked_text(item, self._values(item, latent), wrong), None
        found, heat = self.image(item), self.ev.heat(item, latent, IMAGE)
        if found is None or heat is None:
            return self.plain(item)
        if wrong:
            heat = np.roll(heat, (heat.shape[0] // 2, heat.shape[1] // 2), (0, 1))
        return "", encoded(overlay(found, np.abs(heat), self.ev.items.view[item]))

    def crop(self, item: int, latent: int, cells: float = 3.0, at: tuple[int, int] | None = None) -> Any:
        """What is around the patch where a latent is strongest (or around a patch ``at``), or None without a grid."""
        if self.modality != IMAGE:
            return None
        found, heat = self.image(item), self.ev.heat(int(item), latent, IMAGE)
        if found is None or heat is None:
            return None
        row, col = at or np.unravel_index(np.abs(heat).argmax(), heat.shape)
        return found.crop(patch_box(found.size, heat.shape, self.ev.items.view[int(item)], int(row), int(col), cells))

    def _values(self, item: int, latent: int) -> dict[int, float]:
        rows = self.ev.tokens(item, self.modality)
        if rows is None:
            return {}
        on = rows.latent == latent
        return dict(zip(rows.position[on].tolist(), np.abs(rows.value[on]).tolist(), strict=True))

    def _marked_text(self, item: int, values: dict[int, float], wrong: bool) -> str:
        known = self.ev.words(item, TEXT)
        if known is None or not values:
            return self.ev.items.caption[item]
        least, out, open_ = MARKED * max(values.values()), [], False
        at = known.position.tolist()
        if wrong:
            moved = dict(zip(at, at[len(at) // 2 :] + at[: len(at) // 2], strict=True))
            values = {moved[i]: v for i, v in values.items() if i in moved}
        for i, piece in zip(at, known.text, strict=True):
            on = values.get(i, 0.0) >= least
            if on != open_:
                space = piece[: len(piece) - len(piece.lstrip())] if on else ""
                out.append(space + LEFT if on else RIGHT)
                piece = piece.lstrip() if on else piece
            open_ = on
            out.append(piece)
        return "".join([*out, RIGHT * open_]).strip()


def overlay(image: Any, heat: np.ndarray, view: np.ndarray) -> Any:
    """An image with a heat-map ``(rows, cols)`` over the part of it that the host sees.

    Args:
        image: PIL image.
        heat: Values from 0 on; the largest is drawn strongest.
        view: Left, top, right and bottom of the host's view as shares of the image.
    """
    from PIL import Image

    width, height = image.size
    box = [round(float(v) * s) for v, s in zip(view, (width, height) * 2, strict=True)]
    size = max(1, box[2] - box[0]), max(1, box[3] - box[1])
    share = np.clip(heat / max(float(heat.max()), 1e-12), 0, 1)
    mask = Image.fromarray((share * OPACITY * 255).round().astype(np.uint8)).resize(size, Image.Resampling.BILINEAR)
    alpha = Image.new("L", image.size, 0)
    alpha.paste(mask, (box[0], box[1]))
    return Image.composite(Image.new("RGB", image.size, COLOUR), image, alpha)


def patch_box(
    size: tuple[int, int], shape: tuple[int, int], view: np.ndarray, row: int, col: int, cells: float
) -> tuple[int, int, int, int]:
    """Pixels of ``cells`` patches a side around a patch, moved inside the image, or the whole of a smaller one."""
    out: list[int] = []
    for s, n, low, high, at in zip(size, shape[::-1], view[:2], view[2:], (col, row), strict=True):
        cell = (float(high) - float(low)) * s / n
        side = min(s, max(2, round(cells * cell)))
        start = round(float(low) * s + (at + 0.5) * cell - side / 2)
        start = min(max(0, start), s - side)
        out += [start, start + side]
    return out[0], out[2], out[1], out[3]
