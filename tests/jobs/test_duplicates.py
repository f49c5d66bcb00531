"""Uids that occur twice among parts: the first stays, the others are told part by part."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmsae import partitions
from mmsae.jobs.duplicates import Repeat, UidParts

UIDS = [[1, 2, 3, 3, 4], [], [5, 3, 6, 1, 7], [9]]


@pytest.fixture(params=[4, 1 << 18])
def parts(request, tmp_path, monkeypatch):
    monkeypatch.setattr(partitions, "ROWS", request.param)
    files = []
    for i, uids in enumerate(UIDS):
        files.append(tmp_path / f"{i}.parquet")
        cells = {"uid": pa.array([f"{u:032x}" for u in uids], pa.string())}
        if uids:
            cells["key"] = [f"{i}-{j}" for j in range(len(uids))]
        pq.write_table(pa.table(cells), files[-1])
    return UidParts(files, [f"shard {i}" for i in range(len(UIDS))], tmp_path)


def test_the_first_is_named(parts, tmp_path):
    assert parts.first() == Repeat(f"{3:032x}", "0-3", "shard 0", "0-2", "shard 0")
    assert UidParts(parts.files[2:], parts.labels[2:], tmp_path).first() is None
    assert sorted(tmp_path.iterdir()) == parts.files


def test_the_others_are_dropped_and_listed(parts):
    written = []
    assert parts.drop(lambda *part: written.append(part)) == 3
    assert [(i, new.tolist()) for i, new, _ in written] == [
        (0, [True, True, True, False, True]),
        (2, [True, False, True, False, True]),
    ]
    said = [e for _, _, log in written for e in log.take().examples]
    assert said == [
        ("duplicate", "shard 0", "0-3", f"uid {3:032x} is in shard 0 already"),
        ("duplicate", "shard 2", "2-1", f"uid {3:032x} is in shard 0 already"),
        ("duplicate", "shard 2", "2-3", f"uid {1:032x} is in shard 0 already"),
    ]


def test_uids_in_any_form(tmp_path):
    for name, uids in {"a": ["a", "A" * 32, "a" * 32], "b": ["b", "a"]}.items():
        pq.write_table(pa.table({"uid": uids, "key": uids}), tmp_path / name)
    found = UidParts([tmp_path / "a", tmp_path / "b"], ["a", "b"], tmp_path).first()
    assert found == Repeat("a", "a", "b", "a", "a")
