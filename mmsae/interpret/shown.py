"""Items as a model or a person is shown them: images with heat and crops, captions with marked tokens."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
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
        pieces: ``caption -> its tokens as text``, by position of the site; None: tokens cannot be marked.
    """

    def __init__(self, evidence: Evidence, modality: str, pieces: Callable[[str], Sequence[str]] | None = None):
        self.ev, self.modality, self.pieces = evidence, modality, pieces

    @cached_property
    def places(self) -> bool:
        """Whether a latent has places in an item: patches of an image, or tokens that can be marked."""
        grid = self.ev.grid(self.modality)
        return grid.rows > 1 or grid.cols > 1 if self.modality == IMAGE else grid.places > 1 and self.pieces is not None

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
        caption = self.ev.items.caption[item]
        if self.pieces is None or not values:
            return caption
        pieces, least, out, open_ = self.pieces(caption), MARKED * max(values.values()), [], False
        if wrong:
            words = [i for i, p in enumerate(pieces) if p.strip()]
            moved = dict(zip(words, words[len(words) // 2 :] + words[: len(words) // 2], strict=True))
            values = {moved[i]: v for i, v in values.items() if i in moved}
        for i, piece in enumerate(pieces):
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


def pieces_of(evidence: Evidence) -> Callable[[str], list[str]] | None:
    """How the host cuts captions into the tokens of its text site; None where its positions are no text tokens (pooled
    sites, vision-language models) or it cannot be loaded by name.
    """
    about = evidence.about
    if TEXT not in evidence.modalities or evidence.grid(TEXT).places <= 1 or about["job"]["hint"].startswith("lvlm:"):
        return None
    from mmsae.hosts import load_host
    from mmsae.types import InputError

    try:
        host = load_host(about["job"]["hint"])
    except InputError:
        return None
    tokenizer = getattr(host, "tokenize", None)
    if tokenizer is None:
        return None

    def cut(caption: str) -> list[str]:
        inner, ids = tokenizer._inner, tokenizer([caption])[0].tolist()
        special = {*tokenizer.special_ids(), tokenizer.pad_id()}
        if hasattr(inner, "convert_ids_to_tokens"):
            words = [f" {p}" if p[:2] != "##" else p[2:] for p in map(str, inner.convert_ids_to_tokens(ids))]
            words = [w.replace(" \u2581", " ").replace(" \u0120", " ").replace("</w>", "") for w in words]
        else:
            words = [inner.decode([i]) for i in ids]
        return ["" if i in special else w for i, w in zip(ids, words, strict=True)]

    return cut
