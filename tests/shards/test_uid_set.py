"""A uid for the second time is refused as a set of all uids would refuse it, in memory that stays what it is."""

import errno
import os
import random
import tempfile

import numpy as np
import pytest

from mmsae import partitions
from mmsae.shards import (
    FaultLog,
    Reader,
    ShardWriter,
    UidSet,
    expand,
    make_pipeline,
    read_shards,
    uid_set,
    unit_batches,
)
from mmsae.shards.uid_set import Hashes
from mmsae.types import InputError
from tests.helpers.stores import peak

UID = "0123456789abcdef" * 2


@pytest.fixture
def few(monkeypatch):
    """Bounds of so few uids that a test passes all of them."""
    for module, name, value in ((uid_set, "MOST", 64), (uid_set, "HELD", 16), (uid_set, "_LEAST", 8),
                                (partitions, "ROWS", 32), (uid_set, "ROWS", 32)):  # fmt: skip
        monkeypatch.setattr(module, name, value)


def of(number):
    return f"{number:032x}"


def refused(rows):
    """What a set says of ``(uid, shard, key)`` rows; empty where it takes all."""
    try:
        with UidSet() as uids:
            for row in rows:
                uids.add(*row)
    except InputError as e:
        return str(e)
    return ""


def naive(rows):
    """The first row whose uid came before, and the row that had it first."""
    seen = {}
    for row in rows:
        if row[0] in seen:
            return row, seen[row[0]]
        seen[row[0]] = row
    return None


def test_a_repeated_uid_is_named_with_both_shards():
    rows = [(UID, "x.tar", "k1"), (of(1), "y.tar", "k1")]
    assert not refused(rows)
    assert refused([*rows, (UID, "z.tar", "k2")]).startswith(
        f"uid {UID} of key k2 in shard z.tar was already taken by a sample of shard x.tar: uids must differ"
    )


@pytest.mark.parametrize("n", [5, 16, 17, 63])
def test_it_says_what_a_set_of_all_says(few, n):
    for seed in range(40):
        rng = random.Random(seed)
        rows = [(of(rng.randrange(n * n)), f"{i // 7}.tar", f"k{i}") for i in range(n)]
        said, want = refused(rows), naive(rows)
        if want is None:
            assert said == ""
        else:
            (uid, shard, key), first = want
            assert said.startswith(f"uid {uid} of key {key} in shard {shard} was already taken by a sample of shard "
                                   f"{first[1]}: ")  # fmt: skip


def test_beyond_what_is_held_the_end_tells(few, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    rows = [(of(i * i), f"{i // 50}.tar", f"k{i}") for i in range(400)]
    assert not refused(rows)
    late = [*rows, (of(150**2), "late.tar", "k"), (of(300**2), "later.tar", "k")]
    # one of those that are held is told at once
    assert refused([*late, (of(9), "z.tar", "k")]).startswith(f"uid {of(9)} of key k in shard z.tar was already")
    assert refused(late).startswith(f"uid {of(150**2)} in shard late.tar was already taken by a sample of shard 3.tar:")
    with pytest.raises(KeyError), UidSet() as uids:  # an error on the way is that error
        for row in late:
            uids.add(*row)
        raise KeyError
    assert not list(tmp_path.iterdir())


def test_equal_hashes_of_different_uids_refuse_nothing(few, monkeypatch):
    monkeypatch.setattr(uid_set, "hash", lambda uid: int(uid, 16) % 5, raising=False)
    rows = [(of(i), "a.tar", str(i)) for i in range(60)]
    assert not refused(rows)
    assert refused([*rows, (of(37), "b.tar", "k")]).startswith(f"uid {of(37)} of key k in shard b.tar was already")


@pytest.mark.parametrize("kind", ["random", "crowded", "last"])
def test_hashes(few, monkeypatch, kind):
    monkeypatch.setattr(uid_set, "MOST", 1000)
    rng = np.random.default_rng(0)
    values = {
        "random": rng.integers(0, 2**64, 2000, np.uint64),
        "crowded": rng.integers(0, 900, 2000, np.uint64),  # all belong in the first place of the table
        "last": np.uint64(2**64 - 1) - rng.integers(0, 900, 2000, np.uint64),  # in its last: they go on at its start
    }[kind]
    hashes, seen = Hashes(), set()
    for v in values.tolist():
        v = v or 1
        assert (v in hashes) == (v in seen)
        assert hashes.add(v) == (v in seen)
        if len(seen) < 1000:
            seen.add(v)
        assert len(hashes) == len(seen)
    assert hashes.full == (kind == "random") and len(hashes._table) == 2048


def test_the_table_is_as_large_as_it_is_said_to_be():
    size = uid_set._LEAST
    while size < 2 * uid_set.MOST:
        size *= 4
    assert size * 8 == 256 << 20  # it ends half full


@pytest.fixture
def shards(tmp_path):
    """90 samples of texts, the 80th and the 10th of one uid."""
    with ShardWriter(tmp_path / "s", "s", per_shard=20) as w:
        for i in range(90):
            w.write(f"k{i}", {"txt": f"text {i}", "json": {"uid": of(71 if i == 80 else i)}})
    return str(tmp_path / "s")


def test_all_passes_over_shards_refuse_it_late_too(few, shards):
    reader = Reader.of(None, lambda texts: np.zeros((len(texts), 1)), 7, need=("caption",))
    passes = {
        "read_shards": lambda: read_shards(expand(shards), FaultLog(), need=("caption",)),
        "unit_batches": lambda: unit_batches(expand(shards), None, lambda t: np.zeros((len(t), 1)), 7),
        "exact": lambda: make_pipeline(shards, reader, train=False),
    }
    for name, begin in passes.items():
        got = []
        with pytest.raises(InputError, match=rf"uid {of(71)} in shard s-000004\.tar .* shard s-000003\.tar"):
            got.extend(begin())
        assert len(got) > 10, name  # all but a batch that was held back were given before


def test_a_full_folder_of_temporary_files_is_named(few, tmp_path, monkeypatch):
    def full(*args, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    rows = [(of(i), "a.tar", str(i)) for i in range(100)]
    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    assert not refused(rows[:15])  # few uids need no file
    assert f"{tmp_path}: no space left" in (said := refused(rows)) and said.endswith("let TMPDIR be a folder elsewhere")


def test_memory_is_bounded(monkeypatch):
    for module, name in ((uid_set, "MOST"), (uid_set, "ROWS"), (partitions, "ROWS")):
        monkeypatch.setattr(module, name, 1 << 16)

    def passes(n):
        def work(i):
            with UidSet() as uids:
                for j in range(n if i else 1000):
                    uids.add(of(j * 0x9E3779B97F4A7C15), f"{j >> 14}.tar", "key")

        return work

    few, many = peak(passes(100_000)), peak(passes(500_000))
    assert many < few + 6e6 < 40e6, (few, many)  # a set of them would take 75 MB
