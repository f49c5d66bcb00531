"""A safetensors file written and read block by block, so that no tensor stands in memory a second time.

An SAE of 65,536 latents on a width of 4,096 has 2 GB of weights, and half of them lie in the file transposed. The
format is that of https://huggingface.co/docs/safetensors: the length of a JSON header, the header, the tensors' bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mmsae.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 32 << 20
"""Bytes that are copied at once."""
_KINDS = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
          "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL"}  # fmt: skip


class StoredTensor(NamedTuple):
    """A tensor of a file, which is read when it is copied."""

    file: Path  #: Where.
    name: str  #: Its name there.
    shape: tuple[int, ...]  #: Its shape there.

    def copy_to(self, target: Tensor) -> None:
        """Copy it into a tensor of this shape, of any type and on any device."""
        from safetensors import safe_open

        if not self.shape:
            with safe_open(self.file, "pt") as tensors:
                target.copy_(tensors.get_tensor(self.name))
        for part in _blocks(self.shape, target.element_size()):
            with safe_open(self.file, "pt") as tensors:  # opened anew: what was read of the last block is given back
                target[part].copy_(tensors.get_slice(self.name)[part])


def stored(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a file by their names; nothing but the header is read.

    Raises:
        InputError: It is missing or damaged.
    """
    return {name: StoredTensor(file, name, shape) for name, (_, shape) in described(file)[1].items()}


def described(file: Path) -> tuple[dict[str, str], dict[str, tuple[str, tuple[int, ...]]]]:
    """What the header says: its metadata, and type and shape of every tensor by name. Torch is not imported.

    Raises:
        InputError: The file is missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "np") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}
            shapes = {name: (s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}
            return dict(tensors.metadata() or {}), shapes
    except FileNotFoundError as e:
        raise InputError(f"no {file.name} in {file.parent}: the SAE's weights are missing") from e
    except SafetensorError as e:
        raise InputError(f"{file} is damaged: {e}") from e


def write(file: Path, tensors: Mapping[str, tuple[Tensor, bool]], metadata: Mapping[str, str]) -> None:
    """Write a file.

    Args:
        file: Where.
        tensors: ``{name: (tensor, whether the file holds it transposed)}``.
        metadata: Texts for the header.
    """
    import torch

    views = {name: (t.detach().t() if turned else t.detach()) for name, (t, turned) in tensors.items()}
    # as the library orders them: wide types first, so that each begins at a multiple of its size
    names = sorted(views, key=lambda n: (-views[n].element_size(), n))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    at = 0
    for name in names:
        t = views[name]
        kind = _KINDS[str(t.dtype).removeprefix("torch.")]
        header[name] = {
            "dtype": kind,
            "shape": list(t.shape),
            "data_offsets": [at, at := at + t.numel() * t.element_size()],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            t = views[name].reshape(1) if not views[name].dim() else views[name]
            for part in _in_memory(t):
                out.write(memoryview(part.reshape(-1).view(torch.uint8).numpy()))


def _in_memory(t: Tensor) -> Iterator[Tensor]:
    """Its blocks one after another, contiguous on the CPU; a block is there until the next is asked for.

    What has to be copied goes through one buffer: buffers of their own are given back by the C library when it likes,
    and up to four of them were held at once.
    """
    import torch

    blocks = list(_blocks(t.shape, t.element_size()))
    if t.device.type == "cpu" and t.is_contiguous():
        yield from (t[block] for block in blocks)
    elif blocks:
        buffer = torch.empty_like(t[blocks[0]], device="cpu", memory_format=torch.contiguous_format)
        yield from (buffer[: b.stop - b.start].copy_(t[b]) for b in blocks)


def _blocks(shape: tuple[int, ...], size: int) -> Iterator[slice]:
    """Ranges of the first axis that have so many bytes together, at least one row each."""
    if not shape:
        return
    rows = max(1, BLOCK // max(1, size * math.prod(shape[1:])))
    yield from (slice(i, min(i + rows, shape[0])) for i in range(0, shape[0], rows))
