import numpy as np
import pyarrow.parquet as pq
import pytest

from mmsae.shards import FaultLog, ShardWriter, read_shard
from mmsae.types import InputError
from tests.helpers.filtering import QUIET, filter_shards, make_host, make_shards, results, tree


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Five shards of 16, and a copy of the second between them and in a shard of its own."""
    root = tmp_path_factory.mktemp("duplicates")
    make_host(root)
    make_shards(root / "once")
    (root / "twice").mkdir()
    for p in sorted((root / "once").glob("*.tar")):
        (root / "twice" / p.name).write_bytes(p.read_bytes())
    second, fifth = (list(read_shard(root / f"once/w-{i:06d}.tar", FaultLog())) for i in (1, 4))
    with ShardWriter(root / "twice", "w-again", per_shard=20) as w:
        for n, s in enumerate([*second, *fifth[:3]]):
            w.write(f"copy{n}", {"png": s.raw["png"], "txt": s.raw["txt"], "json": s.meta})
    return root


@pytest.mark.parametrize("how", [{"select": "top"}, {"select": "coverage"}])
def test_the_first_stays_and_the_others_are_listed(root, tmp_path, how):
    sae, twice = str(root / "clip-sae"), str(root / "twice")
    with pytest.raises(InputError, match=r"was already taken by a sample of shard w-000001.*--duplicates drop"):
        filter_shards(sae, twice, str(tmp_path / "refused"), keep=0.4, **QUIET)
    out = tmp_path / "out"
    filter_shards(sae, twice, str(out), keep=0.4, duplicates="drop", **QUIET, **how)
    said = results(out)
    assert said["faults"]["counts"]["duplicate"] == 19 and said["faults"]["dropped"] == 0
    assert said["kept"] == 32 and said["dropped"] == 48
    table = pq.read_table(out / "scores.parquet").to_pydict()
    assert len(table["uid"]) == len(set(table["uid"])) == 80 and "w-again-000000.tar" not in table["shard"]
    assert len(np.load(out / "uids.npy")) == 32
    kept = [s.uid for p in sorted((out / "shards").glob("*.tar")) for s in read_shard(p, FaultLog())]
    assert sorted(kept) == sorted(u for u, k in zip(table["uid"], table["kept"], strict=True) if k)
    listed = [e for e in said["faults"]["examples"] if e[0] == "duplicate"]
    assert all(e[1] == "w-again-000000.tar" and e[2].startswith("copy") for e in listed) and len(listed) >= 19


def test_a_refused_job_goes_on_with_drop(root, tmp_path):
    sae, twice, out = str(root / "clip-sae"), str(root / "twice"), tmp_path / "out"
    with pytest.raises(InputError, match="already taken"):
        filter_shards(sae, twice, str(out), keep=0.4, **QUIET)
    filter_shards(sae, twice, str(out), keep=0.4, duplicates="drop", **QUIET)
    filter_shards(sae, twice, str(tmp_path / "straight"), keep=0.4, duplicates="drop", **QUIET)
    assert tree(out) == tree(tmp_path / "straight")
