"""Writing shards: the same samples give the same bytes, and a set of shards appears whole or not at all."""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from mmsae.files import disk_errors
from mmsae.shards.names import safe_key
from mmsae.types import InputError


def hidden(path: Path) -> Path:
    """The temporary name beside ``path``. It is fixed, so that a killed try is overwritten by the next one."""
    return path.with_name(f".{path.name}.tmp")


class ShardWriter:
    """Writes samples to ``prefix-000000.tar``, ``prefix-000001.tar``, ... as a context manager.

    Shards are written under hidden names and renamed when the block ends; after an error nothing of them is left.
    Shards of an earlier run with the same names are replaced. Time stamps, owners and permissions are constant, so
    equal samples in equal order give equal bytes.

    Args:
        out: Folder, or a path pattern with one ``%06d`` such as ``out/train-%06d.tar.gz``, which then decides over
            ``prefix`` and ``compress``.
        prefix: Start of the file names.
        per_shard: Samples a shard.
        compress: Whether to write ``.tar.gz``.

    Example:
        >>> with ShardWriter("out", "train") as writer:  # doctest: +SKIP
        ...     writer.write("0001", {"png": png_bytes, "txt": "a cat", "json": {"uid": uid}, "cls": 3})
    """

    def __init__(self, out: str | Path, prefix: str = "shard", per_shard: int = 1000, compress: bool = False) -> None:
        if per_shard < 1:
            raise InputError(f"per_shard is {per_shard}; it must be at least 1.")
        self.pattern = str(out)
        if "%" not in self.pattern:
            self.pattern = os.path.join(self.pattern, prefix + "-%06d.tar" + (".gz" if compress else ""))
        self.per_shard = per_shard
        self.compress = self.pattern.endswith("gz")
        self.paths: list[Path] = []
        self.n = 0
        self._keys: set[str] = set()
        self._tar: tarfile.TarFile | None = None

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        try:
            if kind is None:
                with disk_errors(self.pattern):
                    self._close()
                    for path in self.paths:
                        os.replace(hidden(path), path)
        finally:
            self._clear()

    def write(self, key: str, fields: Mapping[str, bytes | str | int | Mapping | list]) -> None:
        """Append one sample.

        Args:
            key: webdataset key; no dot after its last slash, and not used before in this shard. See ``safe_key``.
            fields: ``{field: content}``: bytes as they are, str as UTF-8, int as decimal, dict or list as JSON.

        Raises:
            InputError: If the key cannot be read back or was used already.
            TypeError: If a content is of another type.
        """
        key = safe_key(key)
        if not key or key.endswith("/") or "." in key.rsplit("/", 1)[-1]:
            raise InputError(f"The key {key!r} cannot be read back from a shard: it is empty or has a dot.")
        contents = {f"{key}.{name}": _content(name, value) for name, value in fields.items()}
        with disk_errors(self.pattern):
            if self.n % self.per_shard == 0:
                self._close()
                self._open(Path(self.pattern % (self.n // self.per_shard)))
            if key in self._keys:
                raise InputError(f"The key {key!r} was written twice to {self.paths[-1]}.")
            for name, data in contents.items():
                info = tarfile.TarInfo(name)
                info.size, info.mode, info.mtime = len(data), 0o644, 0
                self._tar.addfile(info, io.BytesIO(data))
        self._keys.add(key)
        self.n += 1

    def _open(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.paths.append(path)
        self._keys = set()
        self._file = open(hidden(path), "wb")
        self._zip = gzip.GzipFile("", "wb", 6, self._file, mtime=0) if self.compress else None
        self._tar = tarfile.TarFile(fileobj=self._zip or self._file, mode="w", format=tarfile.GNU_FORMAT)

    def _close(self) -> None:
        if self._tar is not None:
            self._tar.close()
            if self._zip:
                self._zip.close()
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._tar = None

    def _clear(self) -> None:
        """Remove the hidden files that are left: none after a success, all of them after an error."""
        if self._tar is not None:
            with suppress(OSError):  # the last flush fails on a full disk, and what it held is thrown away anyway
                self._file.close()
        for path in self.paths:
            hidden(path).unlink(missing_ok=True)


def _content(name: str, value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, int):  # before JSON, which would write True
        return str(int(value)).encode()
    if isinstance(value, (Mapping, list, tuple)):
        return json.dumps(value, ensure_ascii=False).encode()
    raise TypeError(f"The field {name} is a {type(value).__name__}; a shard holds bytes, str, int, dict or list.")
