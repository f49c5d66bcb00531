"""``mmsae export`` by processes, in parts, on ranks of Lightning and on Ray: the bytes of one process."""

import lightning.pytorch as pl
import numpy as np
import pytest

from mmsae.cli import main
from mmsae.filtering.export import export
from mmsae.filtering.listing import ExportJob
from mmsae.jobs.lightning import LitJob
from mmsae.jobs.status import job_status
from mmsae.jobs.tally import FAILED, UNITS
from mmsae.shards.uids import DATACOMP
from mmsae.types import InputError
from tests.helpers.filtering import tree
from tests.helpers.stores import make_shards


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Five tars, a uid of the second again in the fourth, and a list of two fifths of them."""
    root = tmp_path_factory.mktemp("export")
    make_shards(root / "in", 5, 12, uid=lambda i: f"{(15 if i == 40 else i):032x}")
    np.save(root / "uids.npy", np.array([(0, i) for i in range(60) if i % 5 in (0, 2)], DATACOMP))
    return root


def job(root, out, **spread):
    given = {"per_shard": 4, "duplicates": "drop", "progress": False}
    return export(str(root / "in"), str(root / "uids.npy"), str(out), **given, **spread)


@pytest.fixture(scope="module")
def whole(root):
    found = tree(job(root, root / "whole"))
    assert sorted(found) == [*(f"kept-{i:06d}.tar" for i in range(6)), "results.json"]
    return found


def in_parts(root, out):
    for i in range(2):
        for part in ("2/3", "1/3", "3/3", "1/3"):
            assert job(root, out, part=part) is None
            assert not job_status(out).finished
        made = job(root, out, merge=True)
        assert (made is None) == (i == 0)


def by_processes(root, out):
    job(root, out, devices=2)


def by_ray(root, out):
    job(root, out, engine="ray")


class Exports(LitJob):
    def __init__(self, root, out):
        super().__init__()
        self.job = ExportJob(str(root / "in"), str(root / "uids.npy"), str(out), 4, duplicates="drop", progress=False)

    def work(self, ranks, device):
        self.job.run(ranks)


def by_lightning(root, out):
    trainer = pl.Trainer(accelerator="cpu", devices=1, logger=False, enable_progress_bar=False)
    trainer.predict(Exports(root, out))


@pytest.mark.parametrize("how", [in_parts, by_lightning, pytest.param(by_processes, marks=pytest.mark.long),
                                 pytest.param(by_ray, marks=pytest.mark.long)])  # fmt: skip
def test_the_same_bytes(how, root, whole, tmp_path, request):
    if how is by_ray:
        request.getfixturevalue("ray_of_one")
    how(root, tmp_path / "out")
    assert tree(tmp_path / "out") == whole
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_parts_wait_for_the_merge_and_the_merge_for_parts(root, whole, tmp_path, capsys):
    out = tmp_path / "out"
    with pytest.raises(InputError, match="5 of 5 shards are not done, so there is nothing to merge"):
        job(root, out, merge=True)
    job(root, out, part="1/1")
    assert "part 1/1 of listed: done; next: --merge" in capsys.readouterr().out
    job(root, out, part="1/1")
    assert "nothing is left to do before the parts are merged" in capsys.readouterr().out
    job(root, out, merge=True)
    assert "the parts again, for 6 shards of result" in capsys.readouterr().out
    job(root, out, part="2/2")
    assert [str(p) for p in job_status(out).passes][1].startswith("result: 3 of 6 shards done, 3 missing, 0 failed")
    with pytest.raises(InputError, match=r"3 of 6 shards are not done, .*: kept-000000\.tar, kept-000002\.tar"):
        job(root, out, merge=True)
    job(root, out)  # begun in parts, it goes on in one process
    assert tree(out) == whole


def test_an_output_shard_that_fails_is_named_and_leaves_no_mark(root, whole, tmp_path, monkeypatch, capsys):
    from mmsae.filtering import reshard

    real, out = reshard.groups, tmp_path / "out"

    def broken(path, log):
        if "000002" in path:
            raise InputError("the disk of data-000002.tar is away")
        return real(path, log)

    job(root, out, part="1/1")
    job(root, out, merge=True)
    with monkeypatch.context() as m, pytest.raises(InputError, match=r"kept-00000\d\.tar: the disk of data-000002"):
        m.setattr(reshard, "groups", broken)
        job(root, out, part="1/1")
    assert list((tmp_path / "out.partial").rglob(f"*{FAILED}"))
    with pytest.raises(SystemExit):
        main(["status", str(out)])
    assert "the disk of data-000002.tar is away" in capsys.readouterr().out
    assert tree(job(root, out)) == whole and not list(out.rglob(f"*{FAILED}")) + list(out.rglob(UNITS))
