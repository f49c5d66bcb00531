import gzip
import io

import pyarrow as pa
import pytest

from mmsae.shards import FaultLog, expand, read_shard
from mmsae.shards.group import ShardCut
from mmsae.shards.packed import KEPT, Zstandard, unpacked


def packed(data):
    return pa.Codec("zstd").compress(data, asbytes=True)


def test_reads_forward_and_a_little_back():
    data = bytes(i * i % 251 for i in range(100_000))
    stream = unpacked(io.BytesIO(packed(data)))
    assert isinstance(stream, Zstandard)
    assert stream.read(1000) == data[:1000] and stream.seek(5000) == stream.tell() == 5000
    assert stream.read(3000) == data[5000:8000]
    stream.seek(7999)
    assert stream.read(2) == data[7999:8001]
    stream.seek(8001 - KEPT)
    assert stream.read(KEPT + 10) == data[8001 - KEPT : 8011]
    with pytest.raises(ValueError, match="byte 200 of a packed file is gone"):
        stream.seek(200)
    stream.seek(8011)
    assert stream.read() == data[8011:] and stream.read(5) == b""
    assert stream.seek(200_000) == len(data)


def test_plain_and_gzip_are_as_they_were():
    file = io.BytesIO(b"plain text")
    assert unpacked(file) is file and file.tell() == 0
    assert unpacked(io.BytesIO(gzip.compress(b"packed"))).read() == b"packed"


@pytest.fixture
def same(tmp_path, make):
    """The same tar plain and packed: 40 samples."""
    plain = make.tar(tmp_path / "a.tar", make.pairs(40))
    data = open(plain, "rb").read()
    for name in ("b.tar.zst", "c.tzst", "misnamed.tar"):
        (tmp_path / name).write_bytes(packed(data))
    half = len(data) // 2 // 512 * 512
    (tmp_path / "frames.tar.zst").write_bytes(packed(data[:half]) + packed(data[half:]))
    return tmp_path, data


def test_a_tar_reads_the_same_packed_or_not(same):
    folder, _ = same
    want = [(s.key, s.raw) for s in read_shard(f"{folder}/a.tar", FaultLog())]
    assert len(want) == 40
    for name in ("b.tar.zst", "c.tzst", "misnamed.tar", "frames.tar.zst"):
        log = FaultLog()
        assert [(s.key, s.raw) for s in read_shard(expand(f"{folder}/{name}")[0], log)] == want and not log.counts


def test_cuts_and_damage_are_counted(same):
    folder, data = same
    whole = packed(data)
    (folder / "cut.tar.zst").write_bytes(whole[: len(whole) * 2 // 3])
    short = packed(data[: len(data) // 2])  # a whole frame of half a tar
    (folder / "half.tar.zst").write_bytes(short)
    (folder / "damaged.tar.zst").write_bytes(whole[:4] + b"\xff" * 40 + whole[44:])
    for name, kind in [("cut", "truncated_shard"), ("half", "truncated_shard"), ("damaged", "broken_shard")]:
        log = FaultLog()
        found = [s.key for s in read_shard(f"{folder}/{name}.tar.zst", log)]
        assert log.counts == {kind: 1} and found == [f"{i:05d}" for i in range(len(found))] and len(found) < 40, name


def test_errors_of_the_stream_say_what_it_is():
    whole = packed(b"x" * 100_000 + bytes(range(256)) * 50)
    with pytest.raises(ShardCut, match="Truncated") as cut:
        Zstandard(io.BytesIO(whole[:-20])).read()
    assert cut.value.kind == "truncated_shard"
