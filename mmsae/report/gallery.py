"""Concepts to look at: the top images and captions of a latent, and the codes of a pair beside each other."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmsae.kernels.pairs import code_cosine
from mmsae.metrics.concepts.evidence import TopTable
from mmsae.types import IMAGE, TEXT, Codes


class Thumbnail(NamedTuple):
    """One image on a card."""

    uri: str  #: Data URI
    alt: str  #: Text alternative
    value: float | None = None  #: Activation, or None
    tiny: bool = False  #: Whether it has so few pixels that they should stay sharp when enlarged


class Card(NamedTuple):
    """What a latent looks like."""

    latent: int  #: Index of the latent; below 0 for a card of something else, which shows no number
    name: str  #: Name of what it means, or empty
    facts: list[tuple[str, str]]  #: ``[(label, value)]``, small print
    images: list[Thumbnail]  #: Top images of the latent
    captions: list[tuple[str, float]]  #: ``[(caption, activation)]``, no caption twice


class Gallery(NamedTuple):
    """Cards with a heading."""

    cards: Sequence[Card]
    title: str = ""


class Bar(NamedTuple):
    """One latent in a comparison: sizes as shares of the larger scale, in [0, 1]; shared where neither is 0."""

    label: str
    image: float
    text: float
    image_value: float
    text_value: float
    shared: bool


class CodePair(NamedTuple):
    """The codes of one image and one caption."""

    title: str  #: ``Matched pair``, say
    image: Thumbnail | None  #: What it shows, or None
    caption: str  #: The text
    cosine: float  #: Cosine of the two codes
    bars: list[Bar]  #: The latents of both, shared ones first


def as_array(image: Any) -> np.ndarray:
    """``(H, W, 3) uint8`` of a PIL image, an array, or a ``(3, H, W)`` float tensor in [0, 1]."""
    if isinstance(image, Tensor):
        image = (image.detach().cpu().float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    return np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image)


def thumbnail(image: Any, alt: str, value: float | None = None, size: int = 128, photo: bool = False) -> Thumbnail:
    """An image as a data URI, scaled down to fit ``size`` pixels, never up.

    Args:
        image: PIL image, ``(H, W, 3)`` uint8 array, or ``(3, H, W)`` float tensor in [0, 1].
        alt: Text alternative.
        value: Activation.
        size: Longest side in pixels.
        photo: Kept as JPEG, a fifth of the bytes of a PNG of a photograph, unless it is tiny.
    """
    image = Image.fromarray(as_array(image)).convert("RGB")
    image.thumbnail((size, size))
    buffer = io.BytesIO()
    kind, options = (
        ("jpeg", {"quality": 88, "subsampling": 0}) if photo and max(image.size) > 64 else ("png", {"optimize": True})
    )
    image.save(buffer, kind, **options)
    uri = f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return Thumbnail(uri, alt, value, max(image.size) <= 64)


def names_of(concepts: Sequence[Mapping[str, Any]], side: str = "same", least_f1: float = 0.6) -> dict[int, str]:
    """``{latent: name}`` from the ``concepts`` of :func:`mmsae.metrics.concept_report`, for matches that hold up.

    A latent matched with several concepts gets all their names, best first.
    """
    good = sorted((c for c in concepts if c["f1"][side] >= least_f1), key=lambda c: -c["f1"][side])
    names: dict[int, list[str]] = {}
    for c in good:
        names.setdefault(c["latent"][side], []).append(c["name"])
    return {j: " / ".join(n) for j, n in names.items()}


def shown_latents(tables: Mapping[str, TopTable], correlation: Tensor, n: int = 24) -> list[int]:
    """The ``n`` latents to show first: alive in every modality, by cross-modal correlation ``(d_sae,)``, descending."""
    alive = torch.stack([t.n_fired.cpu() > 0 for t in tables.values()]).all(0)
    score = torch.where(alive, correlation.cpu().nan_to_num(-2), -torch.inf)
    order = score.argsort(descending=True, stable=True)[:n]
    return [j for j in order.tolist() if score[j] > -torch.inf]


def concept_cards(
    latents: Sequence[int],
    tables: Mapping[str, TopTable],
    image_of: Callable[[str], Any],
    caption_of: Mapping[str, str],
    names: Mapping[int, str] | None = None,
    correlation: Tensor | None = None,
    n_images: int = 8,
    n_captions: int = 4,
    size: int = 128,
) -> list[Card]:
    """Cards of some latents.

    Args:
        latents: Which.
        tables: ``{"image": ..., "text": ...}`` top samples.
        image_of: uid to an image as :func:`thumbnail` takes it, or None where it is not at hand.
        caption_of: uid to caption; captions are listed once each, so ask the tables for more than ``n_captions``.
        names: Meanings, where known.
        correlation: ``(d_sae,)`` cross-modal correlation of the codes.
        n_images: Images per card.
        n_captions: Captions per card.
        size: Longest side of the stored images in pixels.
    """
    cards, seen = [], {}
    for j in latents:
        facts = [
            (f"fires on {what}", f"{t.n_fired[j] / max(t.rows, 1):.1%}")
            for m, what in ((IMAGE, "images"), (TEXT, "texts"))
            if (t := tables.get(m)) is not None
        ]
        if correlation is not None and not correlation[j].isnan():
            facts.append(("image-text correlation", f"{correlation[j]:.2f}"))
        images = []
        for uid, value in tables[IMAGE].top(j)[:n_images] if IMAGE in tables else []:
            if uid not in seen:
                image, said = image_of(uid), caption_of.get(uid) or f"image {uid}"
                seen[uid] = None if image is None else thumbnail(image, said, size=size)
            if seen[uid]:
                images.append(seen[uid]._replace(value=value))
        captions: dict[str, float] = {}
        for uid, value in tables[TEXT].top(j) if TEXT in tables else []:
            if (text := caption_of.get(uid)) and len(captions) < n_captions:
                captions.setdefault(text, value)
        cards.append(Card(j, (names or {}).get(j, ""), facts, images, list(captions.items())))
    return cards


@torch.no_grad()
def compare_codes(
    image: Codes,
    text: Codes,
    title: str,
    caption: str,
    image_shown: Any = None,
    names: Mapping[int, str] | None = None,
    most: int = 12,
    size: int = 256,
) -> CodePair:
    """The codes (one row each) of an image and a caption, latent by latent, the ``most`` strongest first.

    ``image_shown`` is the image as :func:`thumbnail` takes it, ``size`` its longest stored side in pixels, ``names``
    are meanings of latents.
    """
    ids = (torch.stack([c.to_dense()[0] for c in (image, text)]) != 0).any(0).nonzero().flatten()
    a, b = (c.gather(ids)[0].detach().cpu() for c in (image, text))
    x, y = a.abs(), b.abs()
    scale = max(x.max().item(), y.max().item()) if len(ids) else 1.0
    rank = torch.minimum(x, y) * 1e3 + torch.maximum(x, y)  # shared latents first, then by strength
    bars = [
        Bar(
            f"#{ids[i]} {(names or {}).get(int(ids[i]), '')}".strip(),
            x[i].item() / scale,
            y[i].item() / scale,
            a[i].item(),
            b[i].item(),
            bool(a[i] != 0 and b[i] != 0),
        )
        for i in rank.argsort(descending=True)[:most].tolist()
    ]
    shown = None if image_shown is None else thumbnail(image_shown, f"image of the {title.lower()}", size=size)
    return CodePair(title, shown, caption, code_cosine(image, text)[0].item(), bars)
