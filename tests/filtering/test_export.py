"""Shards of the samples of a list: members unchanged, whatever the processes and kills."""

import json

import numpy as np
import pytest

from mmsae.cli import main
from mmsae.filtering.export import export
from mmsae.filtering.reshard import Reshard
from mmsae.shards import FaultLog, ShardWriter, read_shard
from mmsae.shards.uids import DATACOMP
from mmsae.types import InputError
from tests.helpers.filtering import tree
from tests.helpers.stores import make_shards

LISTED = [i for i in range(60) if i % 5 in (0, 2)]


@pytest.fixture
def data(tmp_path):
    make_shards(tmp_path / "all", 3, 20, uid=lambda i: f"{i:032x}")
    np.save(tmp_path / "uids.npy", np.array([(0, i) for i in LISTED] + [(5, 5)], DATACOMP))
    return str(tmp_path / "all"), str(tmp_path / "uids.npy")


def samples(folder):
    return [s for p in sorted(folder.glob("*.tar")) for s in read_shard(p, FaultLog(), decode=False)]


def test_the_listed_samples_are_written(data, tmp_path, capsys):
    shards, keep = data
    main(["export", "--shards", shards, "--keep", keep, "--out", str(tmp_path / "out"), "--per-shard", "10"])
    assert "24 of the 25 uids of" in capsys.readouterr().out
    out = tmp_path / "out"
    assert sorted(tree(out)) == [*(f"kept-{i:06d}.tar" for i in range(3)), "results.json"]
    by_uid = {s.uid: s for s in samples(tmp_path / "all")}
    found = samples(out)
    assert [int(s.uid, 16) for s in found] == LISTED and all(s.raw == by_uid[s.uid].raw for s in found)
    said = json.loads((out / "results.json").read_text())
    assert said["samples"] == 24 and said["written_shards"] == 3 and said["uids"] == {"listed": 25, "not_seen": 1}
    assert said["faults"]["counts"] == {"not_in_keep": 36}
    export(shards, keep, str(out), 10)
    assert "finished before" in capsys.readouterr().out


def test_a_killed_job_goes_on(data, tmp_path, monkeypatch):
    whole = tree(export(*data, str(tmp_path / "whole"), 10, progress=False))
    real, done = ShardWriter.write, []

    def killed(self, key, fields):
        done.append(key)
        if len(done) == 15:
            raise KeyboardInterrupt
        real(self, key, fields)

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(ShardWriter, "write", killed)
        export(*data, str(tmp_path / "out"), 10, progress=False)
    missing = []
    monkeypatch.setattr(
        Reshard, "work", lambda self, share, work=Reshard.work: (missing.extend(share.units), work(self, share))
    )
    assert tree(export(*data, str(tmp_path / "out"), 10, progress=False)) == whole and missing == [1, 2]


def test_a_uid_that_occurs_twice(data, tmp_path):
    shards, keep = data
    twice = [shards, str(tmp_path / "more")]
    with ShardWriter(tmp_path / "more", "m") as w:
        w.write("copy", {"txt": "other", "json": {"uid": f"{5:032x}"}})
    with pytest.raises(
        InputError, match=r"of key copy in shard m-000000\.tar was already taken by a sample of shard data-0"
    ):
        export(twice, keep, str(tmp_path / "out"), progress=False)
    out = export(twice, keep, str(tmp_path / "out"), duplicates="drop", progress=False)
    assert [int(s.uid, 16) for s in samples(out)] == LISTED
    said = json.loads((out / "results.json").read_text())
    assert said["faults"]["counts"]["duplicate"] == 1 and said["uids"]["not_seen"] == 1


def test_no_listed_sample_is_refused(data, tmp_path):
    np.save(tmp_path / "none.npy", np.array([(9, 9)], DATACOMP))
    with pytest.raises(InputError, match=r"none of the 1 uids of .*none\.npy is in the shards"):
        export(data[0], str(tmp_path / "none.npy"), str(tmp_path / "out"), progress=False)
