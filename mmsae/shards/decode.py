"""Bytes of one sample to an RGB image, a caption and metadata. Only named fields are read; nothing is unpickled."""

from __future__ import annotations

import io
import json
import math
import re
import warnings
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np
from PIL import Image

from mmsae.shards.uids import draw
from mmsae.types import InputError

_HALF = re.compile("[\ud800-\udfff]")

IMAGE_KEYS = ("jpg", "png", "jpeg", "webp", "gif", "bmp")
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")  # what files of those names hold in practice; never EPS or PSD


class BrokenImage(ValueError):
    """The bytes are not an image that can be decoded; the message says why."""


def to_rgb(image: Image.Image) -> Image.Image:
    """An RGB image of 8 bits a channel, from any mode, of the first frame.

    16-bit greys are scaled (PIL's own conversion clips them to white); what is transparent becomes white, as in
    img2dataset, which wrote LAION and DataComp. EXIF rotation is not applied, as in webdataset and open_clip.
    """
    if image.mode.startswith("I") or image.mode == "F":
        grey = np.asarray(image).clip(0, 65535).astype(np.uint16) >> 8
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def decode_image(data: bytes) -> Image.Image:
    """The RGB image in the bytes of a JPEG, PNG, WebP, GIF or BMP file.

    Raises:
        BrokenImage: If the bytes are empty, cut, damaged, another format or unreasonably large (PIL's own bound).
    """
    image = _by_simplejpeg(data)
    return by_pillow(data) if image is None else image


def by_pillow(data: bytes) -> Image.Image:
    """:func:`decode_image` by Pillow alone, which has the last word on every file."""
    if not data:
        raise BrokenImage("0 bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # below the bound
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                return to_rgb(image)
    except Exception as e:  # decoders raise OSError, ValueError, SyntaxError, struct.error and others on damaged bytes
        reason = "not a known image format" if "cannot identify" in str(e) else str(e)
        raise BrokenImage(f"{len(data)} bytes: {reason}") from e


@cache
def _simplejpeg() -> Any:
    """The module, None where it is not installed."""
    try:
        return import_module("simplejpeg")
    except ImportError:
        return None


def decoder() -> str:
    """What decodes JPEGs here: ``simplejpeg`` where it is installed (extra ``fast``), else ``Pillow``."""
    return "Pillow" if _simplejpeg() is None else "simplejpeg"


def _by_simplejpeg(data: bytes) -> Image.Image | None:
    """The image of a JPEG, with the pixels that Pillow has; None where it is for Pillow to decode or to refuse.

    Both are libjpeg-turbo. Pillow goes by rows into pixels of 4 bytes and back. Left to it are inks, RGB that is stored
    as such, images that may be too large, and files about which the library has as much as a warning.
    """
    fast = _simplejpeg()
    if fast is None or not data.startswith(b"\xff\xd8\xff"):
        return None
    try:
        height, width, colours, _ = fast.decode_jpeg_header(data, strict=True)
        if colours not in ("YCbCr", "Gray") or height * width > (Image.MAX_IMAGE_PIXELS or math.inf):
            return None
        return Image.fromarray(fast.decode_jpeg(data, "RGB", strict=True))
    except ValueError:
        return None


def find_image(raw: Mapping[str, Any]) -> str | None:
    """The first of ``jpg, png, jpeg, webp, gif, bmp`` that the sample has."""
    return next((k for k in IMAGE_KEYS if k in raw), None)


def parse_json(data: bytes) -> tuple[dict[str, Any] | None, str]:
    """The object in a ``json`` field, or None and why there is none.

    Halves of surrogate pairs, which JSON's escapes can write and no encoding can, become U+FFFD, as bytes that are not
    UTF-8 do in a ``txt``.
    """
    try:
        meta = json.loads(data)
        if not isinstance(meta, dict):
            return None, f"it holds a {type(meta).__name__}, not an object"
        if _HALF.search(json.dumps(meta, ensure_ascii=False)):
            meta = _whole(meta)
        return meta, ""
    except (ValueError, RecursionError) as e:
        return None, "nested too deeply" if isinstance(e, RecursionError) else str(e)


def _whole(value: Any) -> Any:
    """The same value with U+FFFD for every lone surrogate."""
    if isinstance(value, str):
        return _HALF.sub("\ufffd", value)
    if isinstance(value, list):
        return [_whole(v) for v in value]
    return {_whole(k): _whole(v) for k, v in value.items()} if isinstance(value, dict) else value


def find_caption(raw: Mapping[str, bytes], meta: Mapping[str, Any], field: str = "", uid: str = "") -> str | None:
    """The caption, stripped, or None where the sample has none.

    ``field`` of ``meta`` holds the caption, or a list of captions of which the first is taken; empty: the ``txt``
    field, or where there is none ``meta["caption"]``. Brackets go into a list or an object: ``captions[2]`` is the
    third, ``captions[random]`` or ``captions[random:SEED]`` one that is drawn by seed and ``uid``, ``captions[en]`` the
    one of a key, and of a list of objects what the first of them has: ``sentences[raw]``, ``sentences[raw][random]``.

    Raises:
        InputError: The brackets are not understood.
    """
    if not field and "txt" in raw:
        return raw["txt"].decode("utf-8-sig", errors="replace").strip()
    field = field or "caption"
    name, steps = (field, ()) if field in meta else _steps(field)
    value = meta.get(name)
    for step in steps:
        value = _into(value, step, uid)
    if isinstance(value, (list, tuple)):
        value = value[0] if value else ""
    return value.strip() if isinstance(value, str) else None


@cache
def _steps(field: str) -> tuple[str, tuple[str, ...]]:
    """``a[b][c]`` as ``a`` and ``(b, c)``."""
    if "[" not in field:
        return field, ()
    name, steps = field.partition("[")[0], re.findall(r"\[([^\[\]]+)\]", field)
    whole = name + "".join(f"[{s}]" for s in steps)
    seeds = [s for s in steps if s.startswith("random:") and not s[7:].isdigit()]
    if not name or whole != field or seeds:
        raise InputError(
            f"caption_field {field} is not understood; it is a field, with [2], [random], [random:SEED] or [KEY]"
        )
    return name, tuple(steps)


def _into(value: Any, step: str, uid: str) -> Any:
    if isinstance(value, Mapping):
        return value.get(step)
    if not isinstance(value, (list, tuple)):
        return None
    if step == "random" or step.startswith("random:"):
        return value[int(draw(uid, int(step[7:] or 0)) * len(value))] if value else ""
    if step.isdigit():
        return value[int(step)] if int(step) < len(value) else None
    return [v[step] for v in value if isinstance(v, Mapping) and step in v]


def find_cls(raw: Mapping[str, bytes]) -> int | None:
    """The class number in the ``cls`` field, or None."""
    try:
        return int(raw["cls"])
    except (KeyError, ValueError):
        return None
