"""Members of one tar, read in order and robustly: a cut or damaged archive gives all that lies before the damage.

webdataset's own iterator ends silently where a tar is cut between two members or in a header, so that a half-copied
shard looks like a short one. The samples of a shard follow webdataset's naming: everything before the first dot of the
file name is the key, the rest (in lower case) is the field.
"""

from __future__ import annotations

import gzip
import tarfile
import zlib
from collections.abc import Iterator
from typing import BinaryIO

from webdataset.tariterators import base_plus_ext

from mmsae.shards.faults import FaultLog
from mmsae.shards.group import Group, ShardCut
from mmsae.shards.names import is_hidden, valid_name
from mmsae.shards.opened import opened
from mmsae.shards.packed import unpacked
from mmsae.shards.shard import Shard

KEYS_KNOWN = 100_000
"""Keys of one shard among which is looked for those that come again: memory does not grow with the shard."""

MOST_FIELDS = 256
"""Fields of one sample; more are another way of naming members than webdataset's."""


class _Info(tarfile.TarInfo):
    """Tells its archive why no further header was read: ``TarFile.next`` swallows that in the middle of a file."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> tarfile.TarInfo:
        try:
            return super().fromtarfile(tar)
        except tarfile.HeaderError as stop:
            tar.stopped = stop
            raise


def members(file: BinaryIO, read: bool = True) -> Iterator[tuple[str, int, bytes]]:
    """The regular files of a tar, plain or packed (told apart by content, not by name): ``(name, size, content)``.

    What follows an end-of-archive mark is read on, as ``tar -i`` does: concatenated archives are one. Without ``read``
    contents are empty, and a plain tar is only hopped through.

    Raises:
        ShardCut: At the point where the archive ends too early or is damaged.
    """
    stream = unpacked(file)
    ended = False  # whether the last block was an end-of-archive mark
    try:
        tar = tarfile.TarFile(fileobj=stream, tarinfo=_Info, encoding="utf-8")
        while True:
            info = tar.next()
            tar.members = []  # else the headers of the whole archive stay in memory
            if info is None and isinstance(tar.stopped, tarfile.EOFHeaderError):
                ended, tar.offset = True, tar.offset + tarfile.BLOCKSIZE
                continue
            if info is None:
                break
            ended = False
            if not info.isreg() or info.issparse():
                continue
            data = b""
            if read:
                stream.seek(info.offset_data)
                if len(data := stream.read(info.size)) < info.size:
                    detail = f"{info.name} has {len(data)} of its {info.size} bytes"
                    raise ShardCut("truncated_shard", detail, info.name)
            yield info.name, info.size, data
        if not (ended and _nothing_follows(tar)):
            raise tar.stopped
    except EOFError as e:
        raise ShardCut("truncated_shard", f"gzip stream: {e}") from e
    except (tarfile.EmptyHeaderError, tarfile.TruncatedHeaderError) as e:
        raise ShardCut("truncated_shard", "no end-of-archive mark") from e
    except tarfile.TarError as e:
        cut = any(words in str(e) for words in ("unexpected end", "empty", "truncated"))
        detail = f"what follows the end-of-archive mark is no tar: {e}" if ended else str(e)
        raise ShardCut("truncated_shard" if cut else "broken_shard", detail) from e
    except (zlib.error, gzip.BadGzipFile) as e:
        raise ShardCut("broken_shard", str(e)) from e


def _members(unit: Shard, read: bool) -> Iterator[tuple[str, int, bytes]]:
    with opened(unit) as file:
        yield from members(file, read)


def _nothing_follows(tar: tarfile.TarFile) -> bool:
    """Whether an archive ends where its reader stopped, but for zeros."""
    if isinstance(tar.stopped, tarfile.TruncatedHeaderError):
        tar.fileobj.seek(tar.offset)
        return not tar.fileobj.read().strip(b"\0")
    return isinstance(tar.stopped, tarfile.EmptyHeaderError)


def tar_groups(unit: Shard, faults: FaultLog, read: bool = True) -> Iterator[Group]:
    """The samples of a tar.

    Where the shard is cut, the samples before the cut are given and the cut is counted as one dropped sample. The last
    one read is given only if the next one had begun, or if it has every field that the sample before it had; else it
    may be incomplete. A sample of more than ``MOST_FIELDS`` fields is dropped and counted, and not held in memory.
    ``faults`` counts these, keys that come again later (``unsorted``) and names that are not UTF-8; whole samples are
    for the caller to count. Without ``read``, contents are left out.
    """
    shard, group, n, before = unit.name, Group("", {}, {}, {}), 0, None
    known: dict[str, tuple[str, ...]] = {}  # fields of the keys so far

    def usable() -> bool:
        first = known.get(group.key, group.sizes)
        if n and group.sizes.keys().isdisjoint(first):
            faults.add("unsorted", shard, group.key, f"first with {', '.join(first)}, and again later")
        if len(known) < KEYS_KNOWN:
            known.setdefault(group.key, tuple(group.sizes)[:3])
        if n > MOST_FIELDS:
            faults.seen()
            detail = f"{n} members have this key, which ends at the first dot of the file name"
            faults.add("too_many_fields", shard, group.key, detail)
        return 0 < n <= MOST_FIELDS

    try:
        for name, size, data in _members(unit, read):
            key, spelled = base_plus_ext(valid_name(name))
            if key is None or is_hidden(name):
                continue
            field = spelled.lower()
            if key != group.key or field in group.raw:  # a field for the second time is another sample of the same key
                if usable():
                    yield group
                if valid_name(name) != name:
                    faults.add("bad_utf8", shard, key, "the name of its members")
                before, group, n = group.raw.keys(), Group(key, {}, {}, {}), 0
            n += 1
            if n <= MOST_FIELDS:
                group.raw[field], group.sizes[field], group.spelled[field] = data, size, spelled
            else:
                group.raw.clear()
    except ShardCut as cut:
        at = base_plus_ext(valid_name(cut.name))[0] or group.key
        faults.seen()
        faults.add(cut.kind, shard, at, valid_name(cut.detail))
        if at == group.key and not (before and before <= group.raw.keys()):
            return
    if usable():
        yield group
