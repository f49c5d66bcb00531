"""Filtering the samples of a list, and writing shards of exactly those."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from mmsae.shards import FaultLog, read_shard
from mmsae.shards.uids import DATACOMP
from mmsae.types import InputError
from tests.helpers.filtering import QUIET, filter_shards, make_host, make_shards, results, tree


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("keep")
    make_host(root)
    make_shards(root / "shards")
    listed = sorted([f"{i * 7919:032x}" for i in range(80) if i % 4 == 1 or i in (2, 3)] + ["f" * 32])
    np.save(root / "uids.npy", np.array([(int(u[:16], 16), int(u[16:], 16)) for u in listed], DATACOMP))
    return root, listed[:-1]


def options(root, **more):
    sae, shards = str(root / "clip-sae"), str(root / "shards")
    return {"sae": sae, "shards": shards, "keep": str(root / "uids.npy"), **QUIET, **more}


def test_a_list_is_written_as_shards(root, tmp_path, capsys):
    root, listed = root
    out = Path(filter_shards(out=str(tmp_path / "out"), **options(root, progress=True)))
    assert "22 of the 23 uids of" in capsys.readouterr().out
    table = pq.read_table(out / "scores.parquet").to_pydict()
    assert sorted(table["uid"]) == listed and all(table["kept"])
    assert np.array_equal(np.load(out / "uids.npy"), np.load(root / "uids.npy")[:-1])
    kept = [s.uid for p in sorted((out / "shards").glob("*.tar")) for s in read_shard(p, FaultLog())]
    assert sorted(kept) == listed
    said = results(out)
    assert said["uids"] == {"listed": 23, "not_seen": 1} and said["job"]["keep"] == 1.0
    assert said["faults"]["seen"] == 22 and said["faults"]["counts"]["not_in_keep"] == 58
    assert said["weights"]["pairs"] == 22
    again = filter_shards(out=str(tmp_path / "workers"), **options(root, workers=2))
    assert tree(again) == tree(out)


def test_a_share_of_a_list(root, tmp_path):
    root, _ = root
    said = results(filter_shards(out=str(tmp_path / "out"), **options(root, share=0.5)))
    assert said["kept"] == 11 and said["dropped"] == 11 and said["job"]["keep"] == 0.5


def test_the_list_is_part_of_the_job(root, tmp_path):
    root, _ = root
    out = filter_shards(out=str(tmp_path / "out"), **options(root))
    np.save(tmp_path / "other.npy", np.load(root / "uids.npy")[1:])
    with pytest.raises(InputError, match="of another job: its uids is"):
        filter_shards(out=out, **options(root, keep=str(tmp_path / "other.npy")))


@pytest.mark.parametrize(
    "wrong, match",
    [
        ({"keep": 0.5, "share": 0.5}, "share is 0.5, and keep is 0.5: share is for a file"),
        ({"share": 1.5}, "share is 1.5; it is a share above 0 and at most 1"),
        ({"keep": "nowhere.npy"}, "nowhere.npy: not a list of uids that can be read"),
    ],
)
def test_what_is_refused(root, tmp_path, wrong, match):
    with pytest.raises(InputError, match=match):
        filter_shards(out=str(tmp_path / "out"), **options(root[0], **wrong))
    assert not list(tmp_path.iterdir())
