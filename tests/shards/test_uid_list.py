"""Lists of uids: who is in them, whatever the uids look like, and what is refused."""

import pickle

import numpy as np
import pytest

from mmsae.shards import FaultLog, ShardWriter, UidList, count_samples, read_shard, uid_list
from mmsae.shards.uids import DATACOMP, hex_uids, uid_words
from mmsae.types import InputError


def write(path, words):
    words = np.asarray(words, np.uint64).reshape(-1, 2)
    rows = np.ascontiguousarray(words[np.lexsort((words[:, 1], words[:, 0]))]).view(DATACOMP).reshape(-1)
    np.save(path, rows)
    return path


@pytest.mark.parametrize("kind", ["random", "numbers in order", "none"])
def test_members(kind, tmp_path):
    rng = np.random.default_rng(0)
    words = rng.integers(0, 2**64, (600, 2), np.uint64, endpoint=False)
    if kind == "numbers in order":
        words = np.stack([np.zeros(600, np.uint64), np.arange(600, dtype=np.uint64) * 3], 1)
    listed = words[::2] if kind != "none" else words[:0]
    found = UidList(write(tmp_path / "uids.npy", listed))
    others = words + np.array([0, 1], np.uint64)
    members = set(hex_uids(listed)) if len(listed) else set()
    for some in (words, others, words[:1], words[:0]):
        uids = hex_uids(some)
        expected = [u in members for u in uids]
        assert [u in found for u in uids] == expected == found.among(some).tolist()
    assert len(found) == len(listed) and ("f" * 32 in found) is False and ("0" * 32 in found) is ("0" * 32 in members)


def test_it_travels_by_its_path_and_is_known_by_its_hash(tmp_path):
    a = UidList(write(tmp_path / "a.npy", [[1, 2], [3, 4]]))
    b = pickle.loads(pickle.dumps(a))
    assert b.hash == a.hash and f"{1:016x}{2:016x}" in b and f"{2:016x}{2:016x}" not in b
    assert UidList(write(tmp_path / "b.npy", [[1, 2], [3, 5]])).hash != a.hash
    assert len(pickle.dumps(a)) < 10**6 and UidList.of(None) is None


def test_numbers_of_uids():
    uids = ["0" * 31 + "f", "0123456789abcdef" * 2]
    assert uid_words(uids).tolist() == [[0, 15], [0x0123456789ABCDEF] * 2] and hex_uids(uid_words(uids)) == uids


@pytest.mark.parametrize(
    "content, match",
    [
        (
            np.array([(2, 0), (1, 0)], DATACOMP),
            "uids must ascend, and entry 0 is 0000000000000002.* and entry 1 is 0000",
        ),
        (np.array([(1, 5), (1, 5)], DATACOMP), "uids must ascend"),
        (np.arange(4), r"it holds int64 of shape \(4,\), a list of uids is u8,u8"),
        (np.zeros((2, 2), DATACOMP), r"of shape \(2, 2\)"),
        (b"not an array", "not a list of uids that can be read"),
        (None, "not a list of uids that can be read"),
    ],
)
def test_what_is_refused(content, match, tmp_path):
    path = tmp_path / "uids.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.save(path, content)
    with pytest.raises(InputError, match=match):
        UidList(path)


def test_order_is_asked_across_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(uid_list, "_BLOCK", 2)
    np.save(tmp_path / "uids.npy", np.array([(1, 0), (2, 0), (1, 0)], DATACOMP))
    with pytest.raises(InputError, match=r"entry 1 is 0000000000000002.* and entry 2 is 0000000000000001"):
        UidList(tmp_path / "uids.npy")


def test_samples_that_are_not_listed_are_no_faults(tmp_path):
    with ShardWriter(tmp_path, "s", per_shard=10) as w:
        for i in range(10):
            w.write(f"{i}", {"json": {"uid": f"{i:032x}"}} | ({"txt": f"text {i}"} if i != 4 else {}))
    path = tmp_path / "s-000000.tar"
    listed, log = UidList(write(tmp_path / "uids.npy", [[0, 2], [0, 4], [0, 6], [0, 99]])), FaultLog()
    found = [s.key for s in read_shard(path, log, need=("caption",), keep=listed)]
    assert found == ["2", "6"] and log.n_seen == 3
    assert log.counts == {"not_in_keep": 7, "missing_caption": 1} and log.dropped == 1
    assert "dropped as asked: not_in_keep 7" in log.summary() and "2 were not seen" in listed.said(2)
    assert count_samples(str(path), keep=listed) == 3 and count_samples(str(path)) == 10
