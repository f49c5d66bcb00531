"""Output shards are written one by one, in any order and by any process, to the bytes of one pass over the input."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmsae.filtering.columns import Column
from mmsae.filtering.reshard import Reshard, in_runs
from mmsae.jobs.units import Share
from mmsae.shards import FaultLog, ShardWriter, read_shard
from mmsae.types import InputError

SHARDS, EACH = 5, 12


@pytest.fixture
def job(tmp_path):
    """Every third sample of five shards whose keys begin anew in each, without one of the third shard."""
    rng, on = np.random.default_rng(0), np.arange(SHARDS * EACH) % 3 == 0
    on[2 * EACH : 3 * EACH] = False
    paths, parts = [], []
    for s in range(SHARDS):
        with ShardWriter(tmp_path / "in", f"s{s}", per_shard=EACH) as writer:
            for i in range(EACH):
                fields = {"txt": f"text {s} {i}", "json": {"uid": f"{100 * s + i:032x}"}, "png": rng.bytes(20)}
                writer.write(f"{i:03d}", fields)
        paths.append(str(tmp_path / "in" / f"s{s}-000000.tar"))
        uids = [f"{100 * s + i:032x}" for i in range(EACH)]
        parts.append(tmp_path / f"{s}.part")
        pq.write_table(pa.table({"uid": uids, "key": [f"{i:03d}" for i in range(EACH)]}), parts[-1])
    kept = Column.write(tmp_path / "kept", bool, iter([on]))
    made = Reshard(paths, parts, np.arange(SHARDS + 1) * EACH, kept, tmp_path / "plan.npy", tmp_path / "out", 6, False,
                   False)  # fmt: skip
    made.make_plan()
    return made


def tree(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def test_shards_end_when_they_are_full_or_have_the_key(job):
    job.work(Share(job.missing()))
    names = [f"kept-{i:06d}.tar" for i in range(4)]  # four of each, and every one has the keys of the one before
    assert list(tree(job.out)) == names and job.shards == 4
    found = [[s.key for s in read_shard(job.out / n, FaultLog(), need=())] for n in names]
    assert found == [["000", "003", "006", "009"]] * 4
    texts = [s.caption for n in names for s in read_shard(job.out / n, FaultLog(), need=())]
    assert texts == [f"text {s} {i}" for s in (0, 1, 3, 4) for i in (0, 3, 6, 9)]


def test_any_order_and_number_of_processes_gives_the_same(job, tmp_path):
    job.work(Share(job.missing()))
    expected = tree(job.out)
    for runs in ([[3, 0], [2, 1]], [[1], [2, 3], [0]]):
        other = job._replace(out=tmp_path / f"out{len(runs)}")
        for units in runs:
            other.out.mkdir(exist_ok=True)
            other.work(Share(units))
        assert tree(other.out) == expected and other.missing() == []


def test_what_is_there_is_not_written_again(job):
    job.work(Share(job.missing()))
    expected = tree(job.out)
    (job.out / "kept-000002.tar").unlink()
    (job.out / ".kept-000002.tar.tmp").write_bytes(b"half")
    assert job.missing() == [2]
    job.work(Share([2]))
    assert tree(job.out) == expected


def test_an_input_that_has_changed_is_refused(job):
    with ShardWriter(job.paths[1].replace("-000000.tar", "-%06d.tar"), per_shard=EACH) as writer:
        for i in range(EACH):
            if i != 6:
                writer.write(f"{i:03d}", {"txt": "", "json": {"uid": f"{100 + i:032x}"}})
    with pytest.raises(InputError, match=r"s1-000000\.tar has changed since it was scored: 2 of its samples"):
        job.work(Share(job.missing()))
    assert list(tree(job.out)) == ["kept-000000.tar"]


def test_processes_get_neighbours():
    dealt = in_runs([1, 2, 5, 7, 8, 9, 11], 3)
    assert [dealt[r::3] for r in range(3)] == [[1, 2, 5], [7, 8], [9, 11]]
    assert in_runs([4, 6], 5) == [4, 6] and in_runs([], 2) == []
