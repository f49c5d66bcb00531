"""Hashes of uids: fixed for ever, because splits follow from them. Uids of tars with equal names."""

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from mmsae.activations import ActivationStore, extract
from mmsae.activations.uids import uid_hash
from mmsae.activations.writer import PartWriter, StoreWriter
from mmsae.shards import uid_set
from mmsae.types import InputError
from tests.helpers.stores import FakeHost, contents, make_shards

QUIET = {"workers": 0, "progress": False}


def test_hashes_are_what_they_were():
    uids = ["0" * 32, "0" * 31 + "1", "not a hash"]
    assert uid_hash(uids).tolist() == [reference(u) for u in uids]


def reference(uid):
    """splitmix64 over the four 8-byte words of the uid, in plain integers."""
    mask = 2**64 - 1
    text = uid.encode() if len(uid) == 32 else hashlib.blake2b(uid.encode(), digest_size=16).hexdigest().encode()
    h = 0
    for i in range(0, 32, 8):
        h = ((h ^ int.from_bytes(text[i : i + 8], "little")) + 0x9E3779B97F4A7C15) & mask
        h = ((h ^ (h >> 30)) * 0xBF58476D1CE4E5B9) & mask
        h = ((h ^ (h >> 27)) * 0x94D049BB133111EB) & mask
        h ^= h >> 31
    return h


def test_chunks_and_slices_do_not_matter():
    uids = [hashlib.md5(str(i).encode()).hexdigest() for i in range(100)]
    whole = uid_hash(uids)
    chunked = pa.chunked_array([pa.array(uids[:30]), pa.array(uids)[30:]])
    assert np.array_equal(uid_hash(chunked), whole)
    assert np.array_equal(uid_hash(pa.array(uids)[10:20]), whole[10:20])
    assert uid_hash([]).shape == (0,)


def test_similar_uids_spread_evenly():
    h = uid_hash([f"{i:032x}" for i in range(20000)])
    assert len(set(h.tolist())) == 20000
    counts = np.bincount((h >> np.uint64(60)).astype(int), minlength=16)
    assert (np.abs(counts - 1250) < 6 * 1250**0.5).all()


def test_two_sets_whose_tars_have_equal_names(tmp_path, monkeypatch):
    host = FakeHost()
    a, b = (make_shards(tmp_path / n) for n in ("a", "b"))
    s = ActivationStore(extract(host, [*a, *b], tmp_path / "s", batch_size=4, **QUIET))
    alone = ActivationStore(extract(host, a, tmp_path / "alone", batch_size=4, **QUIET))
    assert len(set(s.uids)) == s.spec.items == 2 * alone.spec.items
    names = ["/".join(Path(p).parts[-2:]) for p in (*a, *b)]
    assert [x.source for x in s.spec.shards] == [n for n, _ in s.spec.job["shards"]] == names

    def stops(self, unit, source):
        if unit == len(names) - 1:
            raise KeyboardInterrupt
        return PartWriter(self, unit, source)

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(StoreWriter, "open_part", stops)
        extract(host, [*a, *b], tmp_path / "t", batch_size=4, **QUIET)
    # one tar is left, whose name no other of those that are read has
    assert contents(extract(host, [*a, *b], tmp_path / "t", batch_size=4, **QUIET)) == contents(s.folder)


def test_what_is_more_than_is_remembered_is_found_in_the_merge(tmp_path, monkeypatch):
    monkeypatch.setattr(uid_set, "MOST", 6)
    paths = make_shards(tmp_path / "in", 4, 5, uid=lambda i: f"{i:032x}")
    whole = extract(FakeHost(), paths, tmp_path / "s", batch_size=4, **QUIET)
    assert len(ActivationStore(whole)) == 20
    twice = make_shards(tmp_path / "twice", 4, 5, uid=lambda i: f"{(12 if i == 17 else i):032x}")
    with pytest.raises(InputError, match=rf"uid {12:032x} occurs twice.*000002.*000003"):
        extract(FakeHost(), twice, tmp_path / "t", batch_size=4, **QUIET)
    assert len(list((tmp_path / "t").glob("*.parquet"))) == 4  # all parts were written before it was found
    soon = make_shards(tmp_path / "soon", 4, 5, uid=lambda i: f"{(2 if i == 12 else i):032x}")
    with pytest.raises(InputError, match=rf"uid {2:032x} occurs twice.*000000.*000002"):
        extract(FakeHost(), soon, tmp_path / "u", batch_size=4, **QUIET)
    assert len(list((tmp_path / "u").glob("*.parquet"))) == 3  # all but the third
    with pytest.raises(InputError, match=rf"uid {2:032x} occurs twice.*000000.*000002"):  # what was written counts
        extract(FakeHost(), soon, tmp_path / "u", batch_size=4, **QUIET)
