"""The files of a browser: scripts that hand plain values and packed arrays to the page.

A page that is opened from a disk may not read files, but it may run scripts. So all data lie in scripts of one call,
``mmsae.put(KEY, VALUE)``; arrays are base64 of little-endian bytes, which a page decodes as it needs them.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np

SHARD = 256  #: Latents in a shard
PACK = 32  #: Items in a pack
LARGEST = {"i1": 127, "i2": 32767, "u1": 255, "u2": 65535}
_TYPES = {"i1": np.int8, "u1": np.uint8, "i2": np.int16, "u2": np.uint16, "i4": np.int32, "f4": np.float32}


def packed(array: np.ndarray, kind: str = "") -> dict[str, Any]:
    """An array as ``{"t": type, "s": shape, "d": base64}``; ``kind`` is i1, u1, i2, u2, i4 or f4,
    else the array's own.

    Raises:
        OverflowError: A whole number does not fit.
    """
    array = np.asarray(array)
    kind = kind or array.dtype.str[1:]
    out = array.astype(_TYPES[kind])
    if kind != "f4" and array.size and not np.array_equal(out, array):
        raise OverflowError(f"numbers from {array.min()} to {array.max()} do not fit {kind}")
    return {"t": kind, "s": list(out.shape), "d": base64.b64encode(np.ascontiguousarray(out)).decode()}


def share_of(value: np.ndarray, most: np.ndarray, kind: str) -> dict[str, Any]:
    """Values as whole numbers, signed or not: shares of a maximum, at least 1 where they are not 0."""
    share = np.asarray(value, np.float64) / np.maximum(most, 1e-30)
    whole = np.sign(share) * np.clip(np.rint(np.abs(share) * LARGEST[kind]), 1, LARGEST[kind])
    return packed(whole, kind)


def indices(array: np.ndarray, size: int) -> dict[str, Any]:
    """Places in a list of ``size``, -1 for none, packed: as unsigned 16 bits, 65535 for none, where they fit."""
    if size >= 65535:
        return packed(array, "i4")
    return packed(np.where(np.asarray(array) < 0, 65535, array), "u2")


def put(folder: Path, key: str, value: Any) -> int:
    """Write the script ``folder/KEY.js`` and return its size in bytes."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    data = f"mmsae.put({json.dumps(key)},{text});\n".encode("utf-8", "replace")
    path = folder / f"{key}.js"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return len(data)
