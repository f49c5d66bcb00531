import errno
import json

import pytest
import webdataset as wds

from mmsae.shards import FaultLog, ShardWriter, expand, read_shard
from mmsae.types import InputError

UID = "0123456789abcdef" * 2


def write(out, make, n=7, **kw):
    with ShardWriter(out, "train", **kw) as writer:
        for i in range(n):
            fields = {"png": make.picture((i, 0, 0)), "txt": f"naïve {i}", "json": {"uid": UID[:-1] + str(i)}, "cls": i}
            writer.write(f"a.b/{i:04d}", fields)
    return writer.paths


@pytest.mark.parametrize("compress", [False, True])
def test_what_is_written_is_read_back_here_and_by_webdataset(tmp_path, make, compress):
    paths = write(tmp_path, make, per_shard=3, compress=compress)
    suffix = ".tar.gz" if compress else ".tar"
    assert [p.name for p in paths] == [f"train-{i:06d}{suffix}" for i in range(3)]
    assert expand(str(tmp_path)) == [str(p) for p in paths]
    log = FaultLog()
    samples = [s for p in paths for s in read_shard(p, log)]
    assert [(s.key, s.caption, s.cls, s.uid[-1]) for s in samples] == [
        (f"a.b/{i:04d}", f"naïve {i}", i, str(i)) for i in range(7)
    ]
    assert log.counts == {}
    theirs = list(wds.WebDataset([str(p) for p in paths], shardshuffle=False))
    assert [(s["__key__"], s["txt"].decode(), json.loads(s["json"])["uid"]) for s in theirs] == [
        (s.key, s.caption, s.uid) for s in samples
    ]


@pytest.mark.parametrize("compress", [False, True])
def test_equal_samples_give_equal_bytes(tmp_path, make, compress):
    ours = [write(tmp_path / folder, make, compress=compress)[0].read_bytes() for folder in "ab"]
    assert ours[0] == ours[1]


def test_a_pattern_names_the_shards(tmp_path, make):
    assert [p.name for p in write(tmp_path / "x-%03d.tar.gz", make, per_shard=5)] == ["x-000.tar.gz", "x-001.tar.gz"]


def test_an_error_leaves_nothing_and_the_old_shards_stay(tmp_path, make):
    before = write(tmp_path, make, n=2)[0].read_bytes()
    with pytest.raises(RuntimeError), ShardWriter(tmp_path, "train", per_shard=1) as writer:
        writer.write("new", {"txt": "t"})
        writer.write("newer", {"txt": "t"})
        assert expand(str(tmp_path)) == [str(tmp_path / "train-000000.tar")]
        raise RuntimeError
    assert [p.name for p in tmp_path.iterdir()] == ["train-000000.tar"]
    assert (tmp_path / "train-000000.tar").read_bytes() == before


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path, make, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    sentence = r"train.*no space left .*B are free"
    with pytest.raises(InputError, match=sentence), ShardWriter(tmp_path, "train") as writer:
        writer.write("a", {"txt": "t"})
        monkeypatch.setattr("os.fsync", full)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_read_back_is_refused(tmp_path):
    for key in ("", "a.b", "folder/", "x/a.b"):
        with pytest.raises(InputError, match="cannot be read back"), ShardWriter(tmp_path) as writer:
            writer.write(key, {"txt": "t"})
    with pytest.raises(InputError, match=r"'a' was written twice to .*-000000\.tar"), ShardWriter(tmp_path) as writer:
        writer.write("a", {"txt": "t"})
        writer.write("a", {"txt": "t"})
    with pytest.raises(TypeError, match="field score is a float"), ShardWriter(tmp_path) as writer:
        writer.write("a", {"score": 0.5})
    with pytest.raises(InputError, match="per_shard is 0"):
        ShardWriter(tmp_path, per_shard=0)
    assert list(tmp_path.iterdir()) == []
