"""Folders and files that are either whole or not there, and one clear sentence where the disk is full."""

from __future__ import annotations

import codecs
import errno
import glob
import json
import math
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from mmsae.errors import EndsJob, InputError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# torch and safetensors write files by themselves and report the operating system's error in their message only
_FULL_TEXT = re.compile(rf"No space left|Disk quota exceeded|File too large|os error ({'|'.join(map(str, _FULL))})\b")


def nbytes(n: float) -> str:
    """``1.5 GB``."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if unit == "bytes" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} TB"


def duration(seconds: float) -> str:
    """``40 s``, ``12 min``, ``3.1 h``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def read_text(path: str | Path) -> str:
    """The text of a file that a person wrote: UTF-8 with or without byte order mark, or UTF-16 or 32 with one.

    Raises:
        InputError: No such file, or another encoding.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as e:
        raise InputError(f"{path} cannot be read: {e.strerror}") from e
    marks = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF16_LE: "utf-16",
             codecs.BOM_UTF16_BE: "utf-16"}  # fmt: skip
    encoding = next((name for mark, name in marks.items() if data.startswith(mark)), "utf-8-sig")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as e:
        name = encoding.removesuffix("-sig").upper()
        raise InputError(f"{path} cannot be read: byte {e.start} is not {name} text; save it as UTF-8") from e
    if "\0" in text:
        raise InputError(f"{path} cannot be read: it has zero bytes, as UTF-16 without a mark has; save it as UTF-8")
    return text


def lines_of(text: str) -> list[str]:
    """Lines as editors show them, ended by LF or CRLF; U+2028, U+0085 and their like are characters of a line."""
    lines = text.replace("\r\n", "\n").split("\n")
    return lines if lines[-1] else lines[:-1]


def read_columns(path: str | Path, columns: Sequence[str], fill: Mapping[str, Any], remedy: str) -> dict[str, Any]:
    """``{column: array}`` of a parquet file of ours, which an older version may have written.

    Args:
        path: The file.
        columns: What is read.
        fill: What stands for columns that older versions did not write.
        remedy: What writes the file anew, for the sentence.

    Raises:
        InputError: It cannot be read, or lacks a column that nothing stands for.
    """
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowInvalid) as e:
        raise InputError(f"{path} cannot be read as parquet ({e}): {remedy}") from e
    if lost := [c for c in columns if c not in table.column_names and c not in fill]:
        raise InputError(f"{path} has no column {lost[0]}, as another version of mmsae wrote it: {remedy}")
    n = len(table)
    return {c: table[c].to_numpy(zero_copy_only=False) if c in table.column_names else np.full(n, fill[c])
            for c in columns}  # fmt: skip


def free_bytes(path: str | Path) -> int:
    """Free space where ``path`` is, or will be once it exists."""
    path = Path(path).absolute()
    return shutil.disk_usage(next(p for p in (path, *path.parents) if p.exists())).free


def _full(e: BaseException | None) -> str | None:
    while e is not None:
        if getattr(e, "errno", None) in _FULL:
            return e.strerror
        if found := _FULL_TEXT.search(str(e)):
            return found[0]
        e = e.__cause__ or e.__context__
    return None


@contextmanager
def disk_errors(
    path: str | Path, needed: int | None = None, then: str = "run the same command again"
) -> Iterator[None]:
    """Turn a full disk (or quota, or file size limit) inside the block into one sentence.

    ``needed`` bytes still had to be written, where that is known; ``then`` is what to do once there is room.

    Raises:
        EndsJob: The disk is full.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as e:
        reason = _full(e)
        if reason is None:
            raise
        more = "" if needed is None else f"about {nbytes(needed)} more are needed and "
        raise EndsJob(
            f"{path}: no space left to write to ({reason}): {more}{nbytes(free_bytes(path))} are free; "
            f"what is finished is kept, make room and {then}"
        ) from e


def refuse_foreign(target: str | Path, mark: str) -> None:
    """Refuse to replace a folder that holds something, but not the file by which its kind is known.

    Raises:
        InputError: It would be lost.
    """
    target = Path(target)
    if target.is_file() or (target.is_dir() and any(target.iterdir()) and not (target / mark).is_file()):
        raise InputError(f"{target} holds other things and no {mark}; they would be lost: name a folder of its own")


def check_writable(target: str | Path) -> None:
    """Refuse a place that cannot be written, before the work whose result goes there.

    Raises:
        InputError: Naming the folder and the reason.
    """
    parent = Path(target).parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=parent):
            return
    except OSError as e:
        raise InputError(f"{target} cannot be written: {e.strerror or e}") from e


@contextmanager
def atomic_folder(target: str | Path) -> Iterator[Path]:
    """A temporary folder beside ``target`` that takes its place when the block ends well.

    A crash leaves the old folder (or none) and a ``.NAME.tmp-*`` beside it, never a half-written target.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temp = target.parent / f".{target.name}.tmp-{uuid.uuid4().hex[:8]}"
    temp.mkdir()
    try:
        yield temp
        for file in temp.rglob("*"):  # safetensors makes files that nobody else may read; the folder follows the umask
            if file.is_file():
                file.chmod(temp.stat().st_mode & 0o666)
        old = None
        if target.exists():
            old = target.parent / f".{target.name}.old-{uuid.uuid4().hex[:8]}"
            os.replace(target, old)
        os.replace(temp, target)
        if old:
            shutil.rmtree(old)
    except BaseException:
        shutil.rmtree(temp, ignore_errors=True)
        raise


@contextmanager
def atomic_file(target: str | Path) -> Iterator[Path]:
    """A temporary path beside ``target`` that is renamed over it when the block ends well."""
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temp = target.parent / f".{target.name}.tmp-{uuid.uuid4().hex[:8]}"
    try:
        yield temp
        os.replace(temp, target)
    except BaseException:
        temp.unlink(missing_ok=True)
        raise


def cache_folder() -> Path:
    """Where what can be made again is kept.

    It is ``$MMSAE_CACHE``, else ``$XDG_CACHE_HOME/mmsae``, else ``~/.cache/mmsae``.
    """
    if given := os.environ.get("MMSAE_CACHE"):
        return Path(given).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmsae"


def remove_leftovers(target: str | Path) -> None:
    """Remove what killed processes left beside ``target``; only where no other process is writing it."""
    target = Path(target)
    for kind in ("tmp", "old"):
        for path in target.parent.glob(f".{glob.escape(target.name)}.{kind}-*"):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def write_json(target: str | Path, value: Any, indent: int = 2) -> Path:
    """Write a JSON file that is either whole or not there, and return its path."""
    with disk_errors(target), atomic_file(target) as temp:
        temp.write_text(json.dumps(value, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")
    return Path(target)


def null_for_nan(value: Any) -> Any:
    """Plain values with None in the place of numbers that are not finite, which JSON has no word for."""
    if isinstance(value, Mapping):
        return {k: null_for_nan(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [null_for_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_whole(path: Path, data: bytes) -> None:
    """Write a small file so that it is either whole or absent, whatever kills the process or the machine."""
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(tmp, "wb") as f:
            f.write(data)
            commit(f, tmp, path)
    except BaseException:
        tmp.unlink(missing_ok=True)
        raise


def write_new(path: Path, data: bytes) -> None:
    """The same where no such file is; where another process is faster, its file stays, and its locks hold."""
    tmp = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    write_whole(tmp, data)
    try:
        os.link(tmp, path)
    except FileExistsError:
        return
    except OSError:  # a file system without links
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)


def commit(f: BinaryIO, tmp: Path, path: Path) -> None:
    """Bytes to the disk, then the name: after a power cut too, a file with its final name is whole."""
    f.flush()
    os.fsync(f.fileno())
    os.replace(tmp, path)
    fd = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
