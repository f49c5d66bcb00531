"""Files that are either whole or absent, and safetensors files written in a stream and read through a map."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from mmsae.files import commit
from mmsae.types import InputError

_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.uint8: "U8",
}  # fmt: skip
_TYPES = {v: k for k, v in _NAMES.items()}
_CHUNK = 1 << 22


class Spool:
    """Tensors of unknown length, appended batch by batch on disk and joined into one safetensors file at the end.

    Memory stays at one batch however large the shard is; the disk holds the shard twice while it is joined.

    Args:
        path: The final file. While it is written, hidden ``.NAME*.tmp`` files stand beside it.

    Raises:
        InputError: Another process is writing the same file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.columns: dict[str, tuple[BinaryIO, Path, torch.dtype, tuple[int, ...]]] = {}
        self.rows: dict[str, int] = {}
        self._tmp = path.with_name(f".{path.name}.tmp")
        self._out = open(self._tmp, "ab")
        try:  # a lock dies with its process, so a killed job leaves none
            fcntl.flock(self._out, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            self._out.close()
            raise InputError(f"{path}: another running process is writing this part of the store") from e
        self._out.truncate(0)

    @property
    def size(self) -> int:
        """Bytes of tensor data so far."""
        return sum(_size(self.rows[n], t, tail) for n, (_, _, t, tail) in self.columns.items())

    def append(self, name: str, rows: Tensor) -> None:
        """Add ``rows (n, ...)`` (CPU) to the tensor ``name``."""
        if name not in self.columns:
            tmp = self.path.with_name(f".{self.path.name}.{len(self.columns)}.tmp")
            self.columns[name] = (open(tmp, "wb"), tmp, rows.dtype, tuple(rows.shape[1:]))
            self.rows[name] = 0
        self.columns[name][0].write(_bytes(rows))
        self.rows[name] += len(rows)

    def finish(self) -> tuple[int, str]:
        """Join the columns and give the file its name; returns its size and blake2b-256."""
        # widest element first, so that every tensor is aligned to its own element size
        names = sorted(self.columns, key=lambda n: (-self.columns[n][2].itemsize, n))
        header, at = {}, 0
        for n in names:
            _, _, dtype, tail = self.columns[n]
            end = at + _size(self.rows[n], dtype, tail)
            header[n] = {"dtype": _NAMES[dtype], "shape": [self.rows[n], *tail], "data_offsets": [at, end]}
            at = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        hasher = hashlib.blake2b(digest_size=32)
        total = 0
        for block in self._blocks(len(text).to_bytes(8, "little") + text, names):
            self._out.write(block)
            hasher.update(block)
            total += len(block)
        commit(self._out, self._tmp, self.path)
        self.close()
        return total, hasher.hexdigest()

    def _blocks(self, head: bytes, names: list[str]) -> Iterator[bytes]:
        yield head
        for n in names:
            f, tmp, _, _ = self.columns[n]
            f.flush()
            with open(tmp, "rb") as g:
                while block := g.read(_CHUNK):
                    yield block

    def close(self) -> None:
        """Remove the temporary files; without :meth:`finish` before it, nothing is left."""
        for f, tmp in [(self._out, self._tmp), *((f, tmp) for f, tmp, _, _ in self.columns.values())]:
            with contextlib.suppress(OSError):  # closing flushes, which fails once more on a full disk
                f.close()
            tmp.unlink(missing_ok=True)
        self.columns = {}


def map_safetensors(path: Path) -> tuple[mmap.mmap, dict[str, Tensor]]:
    """Map a safetensors file; returns the map and tensors that lie in it (no byte is read before it is used).

    Mapped here instead of by ``safe_open`` because the map has an owner that can let go of pages it no longer needs
    (:func:`release`): a pass over a store larger than memory then stays as small as its window.
    """
    with open(path, "rb") as f:
        # a private map: numpy and torch want writable memory, and nothing ever writes
        m = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)
    start = 8 + int.from_bytes(m[:8], "little")
    raw = np.frombuffer(m, dtype=np.uint8)
    tensors = {}
    for name, t in json.loads(m[8:start]).items():
        if name != "__metadata__":
            lo, hi = t["data_offsets"]
            flat = torch.from_numpy(raw[start + lo : start + hi])
            tensors[name] = flat.view(_TYPES[t["dtype"]]).view(t["shape"])
    return m, tensors


def release(m: mmap.mmap) -> None:
    """Give the pages of a map back; they stay in the system's cache and are read again when touched."""
    if hasattr(mmap, "MADV_DONTNEED"):
        m.madvise(mmap.MADV_DONTNEED)


def file_hash(path: Path) -> str:
    """Hex blake2b-256 of a file, read in blocks."""
    hasher = hashlib.blake2b(digest_size=32)
    with open(path, "rb") as f:
        while block := f.read(_CHUNK):
            hasher.update(block)
    return hasher.hexdigest()


def _size(rows: int, dtype: torch.dtype, tail: tuple[int, ...]) -> int:
    return rows * dtype.itemsize * math.prod(tail)


def _bytes(x: Tensor) -> memoryview:
    # through uint8, because numpy knows no bfloat16
    return memoryview(x.detach().contiguous().view(-1).view(torch.uint8).numpy()) if x.numel() else memoryview(b"")
