"""Members of one tar, read in order and robustly: a cut or damaged archive gives all that lies before the damage.

webdataset's own iterator ends silently where a tar is cut between two members or in a header, so that a half-copied
shard looks like a short one. The samples of a shard follow webdataset's naming: everything before the first dot of the
file name is the key, the rest (in lower case) is the field.
"""

from __future__ import annotations

import gzip
import re
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from webdataset.tariterators import base_plus_ext

from mmsae.shards.faults import FaultLog
from mmsae.shards.sources import shard_name

_META = re.compile(r"__[^/]*__($|/)")  # webdataset's own bookkeeping members


class ShardCut(Exception):
    """The archive cannot be read further.

    Attributes:
        kind: ``truncated_shard`` (the data ends) or ``broken_shard`` (the data is damaged).
        detail: What was found.
        name: The member that is cut, where its header could still be read.
    """

    def __init__(self, kind: str, detail: str, name: str = "") -> None:
        super().__init__(detail)
        self.kind, self.detail, self.name = kind, detail, name


class _Info(tarfile.TarInfo):
    """Tells its archive why no further header was read: ``TarFile.next`` swallows that in the middle of a file."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> tarfile.TarInfo:
        try:
            return super().fromtarfile(tar)
        except tarfile.HeaderError as stop:
            tar.stopped = stop
            raise


def members(path: str | Path, read: bool = True) -> Iterator[tuple[str, int, bytes]]:
    """The regular files of a ``.tar`` or ``.tar.gz`` (told apart by content, not by name).

    Args:
        path: The archive.
        read: Whether to read the contents; without, a plain tar is only hopped through.

    Yields:
        ``(name, size in bytes, content)``; the content is empty where it is not read.

    Raises:
        ShardCut: At the point where the archive ends too early or is damaged.
    """
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        stream = gzip.GzipFile(fileobj=file) if packed else file
        try:
            tar = tarfile.TarFile(fileobj=stream, tarinfo=_Info)
            while (info := tar.next()) is not None:
                tar.members = []  # else the headers of the whole archive stay in memory
                if not info.isreg() or info.issparse():
                    continue
                data = b""
                if read:
                    stream.seek(info.offset_data)
                    if len(data := stream.read(info.size)) < info.size:
                        detail = f"{info.name} has {len(data)} of its {info.size} bytes"
                        raise ShardCut("truncated_shard", detail, info.name)
                yield info.name, info.size, data
            if not isinstance(stop := tar.stopped, tarfile.EOFHeaderError):
                raise stop
        except EOFError as e:
            raise ShardCut("truncated_shard", f"gzip stream: {e}") from e
        except (tarfile.EmptyHeaderError, tarfile.TruncatedHeaderError) as e:
            raise ShardCut("truncated_shard", "no end-of-archive mark") from e
        except tarfile.TarError as e:
            ends = any(words in str(e) for words in ("unexpected end", "empty", "truncated"))
            raise ShardCut("truncated_shard" if ends else "broken_shard", str(e)) from e
        except (zlib.error, gzip.BadGzipFile) as e:
            raise ShardCut("broken_shard", str(e)) from e


def groups(
    path: str | Path, faults: FaultLog, read: bool = True
) -> Iterator[tuple[str, dict[str, bytes], dict[str, int]]]:
    """The samples of a shard, undecoded: consecutive members of one key.

    Where the shard is cut, the samples before the cut are given and the cut is counted as one dropped sample. The
    last one read is given only if the next one had begun, or if it has every field that the sample before it had;
    else it may be incomplete.

    Args:
        path: The shard.
        faults: Counts the cut (and the sample it cost); whole samples are for the caller to count.
        read: Whether to read the contents.

    Yields:
        ``(key, {field: content}, {field: size in bytes})``.
    """
    key, raw, sizes, before = "", {}, {}, None
    try:
        for name, size, data in members(path, read):
            found, field = base_plus_ext(name)
            if found is None or _META.match(name):
                continue
            field = field.lower()
            if found != key or field in raw:  # a field for the second time is another sample of the same key
                if raw:
                    yield key, raw, sizes
                key, raw, sizes, before = found, {}, {}, raw.keys()
            raw[field], sizes[field] = data, size
    except ShardCut as cut:
        at = base_plus_ext(cut.name)[0] or key
        faults.seen()
        faults.add(cut.kind, shard_name(path), at, cut.detail)
        if at == key and not (before and before <= raw.keys()):
            return
    if raw:
        yield key, raw, sizes
