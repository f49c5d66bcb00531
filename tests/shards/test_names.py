"""Archives as they come: joined, packed by macOS, unsorted, with dots, names that are not UTF-8 or lead elsewhere."""

import gzip
import io
import tarfile
from pathlib import Path

import pytest

from mmsae.shards import FaultLog, ShardWriter, count_samples, describe, make_uid, read_shard
from mmsae.shards.groups import groups
from mmsae.shards.names import safe_key, valid_name
from mmsae.shards.tar import MOST_FIELDS
from mmsae.types import InputError


def read(path, **kw):
    log = FaultLog()
    return list(read_shard(path, log, **kw)), log


def raw_tar(path, members):
    """An archive whose members have names of bytes, in this order."""
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, encoding="utf-8", errors="surrogateescape") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name.decode("utf-8", "surrogateescape"))
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["tar", "tar.gz"])
def test_concatenated_archives_are_read_whole(tmp_path, make, pack):
    parts = [Path(make.tar(tmp_path / f"{i}.tar", make.pairs(3, start=3 * i))).read_bytes() for i in range(3)]
    joined = tmp_path / "joined.tar"
    for content in (pack(b"".join(parts)), b"".join(map(pack, parts)), pack(b"".join(parts) + bytes(700))):
        joined.write_bytes(content)
        samples, log = read(joined)
        assert [s.key for s in samples] == [f"{i:05d}" for i in range(9)] and not log.counts
        assert count_samples(str(joined)) == describe(str(joined))["samples"] == 9
    joined.write_bytes(pack(b"".join(parts)[: len(parts[0]) + len(parts[1]) // 3]))
    samples, log = read(joined)
    assert log.counts == {"truncated_shard": 1} and 3 <= len(samples) < 6


def test_what_follows_an_archive_and_is_none_is_counted(tmp_path, make):
    path = Path(make.tar(tmp_path / "x.tar", make.pairs(3)))
    path.write_bytes(path.read_bytes() + b"<html>" * 500)
    samples, log = read(path)
    assert len(samples) == 3 and log.counts == {"broken_shard": 1}
    assert "follows the end-of-archive mark" in log.summary()


@pytest.mark.parametrize("folder", ["", "photos/", "./photos/"])
def test_what_macos_adds_is_passed_over_in_every_folder(tmp_path, make, folder):
    companions = []
    for key, fields in make.pairs(4):
        companions += [(f"{folder}._{key}.png".encode(), b"\0"), (f"__MACOSX/{folder}._{key}.png".encode(), b"\0")]
        companions += [
            (f"{folder}{key}.{f}".encode(), v.encode() if isinstance(v, str) else v) for f, v in fields.items()
        ]
    path = raw_tar(tmp_path / "x.tar", [(f"{folder}.DS_Store".encode(), b"x"), *companions])
    samples, log = read(path)
    assert [s.key for s in samples] == [f"{folder}{i:05d}" for i in range(4)] and (log.n_seen, log.counts) == (4, {})


def test_names_that_are_not_utf8_are_kept_apart_and_noted(tmp_path, make):
    names = [b"caf\xe9/0", b"caf\xe8/0", b"caf\xc3\xa9/0", b"a\\b\xe9/0", b"a\xe9\\b/0", b"\xed\xa0\xbd/0"]
    members = [(n + b"." + f, v) for n in names for f, v in ((b"png", make.picture()), (b"txt", b"t"))]
    samples, log = read(raw_tar(tmp_path / "x.tar", members))
    keys = [s.key for s in samples]
    assert keys[:3] == ["caf\\xe9/0", "caf\\xe8/0", "caf\u00e9/0"] and len(set(keys)) == len(names)
    assert [k.encode() for k in keys] and log.counts == {"bad_utf8": 5} and log.dropped == 0
    assert samples[0].uid == make_uid("", "x.tar", "caf\\xe9/0", {})
    assert valid_name("plain\\name") == "plain\\name"  # names that were right stay as they are


def test_pictures_first_and_captions_after_name_the_remedy(tmp_path, make):
    image = make.picture()
    members = [(f"{i}.png".encode(), image) for i in range(6)] + [(f"{i}.txt".encode(), b"t") for i in range(6)]
    _, log = read(raw_tar(tmp_path / "x.tar", members))
    assert log.counts == {"missing_caption": 6, "missing_image": 6, "unsorted": 6}
    with pytest.raises(InputError, match=r"missing_caption x\.tar 0 .has png.. 6 keys come again .* tar --sort=name"):
        log.check(0.05, final=True)
    repeated = make.tar(tmp_path / "y.tar", make.pairs(2) + make.pairs(2))  # whole samples, which uids refuse
    assert read(repeated)[1].counts == {}


def test_dots_in_names_are_explained_in_a_few_words_and_not_held_in_memory(tmp_path, make):
    image = make.picture()
    dotted = [(f"IMG.{i:05d}.{f}".encode(), v) for i in range(200) for f, v in (("png", image), ("txt", b"t"))]
    samples, log = read(raw_tar(tmp_path / "x.tar", dotted))
    (kind, _, key, detail), *_ = log.take().examples
    assert not samples and (kind, key) == ("too_many_fields", "IMG") and len(detail) < 100
    assert "400 members" in detail and "first dot" in detail
    assert list(groups(tmp_path / "x.tar", FaultLog())) == []
    _, log = read(raw_tar(tmp_path / "y.tar", dotted[: MOST_FIELDS - 2]))
    (kind, _, _, detail), *_ = log.take().examples
    assert kind == "missing_image" and len(detail) < 200 and "248 more; the key ends at the first dot" in detail
    assert len(describe(str(tmp_path / "y.tar"))["keys"]) == 30


@pytest.mark.parametrize(
    ("key", "safe"),
    [
        ("a/b", "a/b"),
        ("./a", "./a"),
        ("a..b/c", "a..b/c"),
        ("../../x", "x"),
        ("a/../../x", "a/x"),
        ("/etc/x", "etc/x"),
        ("..\\..\\x", "x"),
    ],
)
def test_keys_that_lead_out_of_a_folder_do_not_when_they_are_written(tmp_path, key, safe):
    assert safe_key(key) == safe
    with ShardWriter(tmp_path) as writer:
        writer.write(key, {"txt": "t"})
    with tarfile.open(writer.paths[0]) as archive:
        assert archive.getnames() == [f"{safe}.txt"]
    with ShardWriter(tmp_path) as writer, pytest.raises(InputError, match="cannot be read back"):
        writer.write("../..", {"txt": "t"})
