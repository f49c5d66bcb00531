"""What is tried before a job begins, and the sentence that comes of it."""

import io
import tarfile
import time

import pytest

from mmsae.errors import InputError
from mmsae.jobs import estimate as module
from mmsae.jobs.estimate import FEW, estimate
from mmsae.shards import UnitBatch
from mmsae.shards.sources import expand
from mmsae.types import ImageTextBatch


@pytest.fixture()
def tars(tmp_path):
    paths = []
    for t in range(2):
        paths.append(str(tmp_path / f"{t}.tar"))
        with tarfile.open(paths[-1], "w") as tar:
            for i in range(30):
                member = tarfile.TarInfo(f"{t}{i:03d}.txt")
                member.size = 1
                tar.addfile(member, io.BytesIO(b"x"))
    return paths


@pytest.mark.parametrize(
    "whole,first,a_sample,sizes",
    [
        (True, 0.3, 0, [16, 16]),  # the first has much to prepare, and does not count
        (True, 0, 0.02, [16, 16]),
        (False, 0, 0, [1, 16]),
        (False, 0, 0.02, [1, FEW]),
        (False, 0.3, 0.02, [1, FEW]),
    ],
)
def test_the_second_pass_counts_and_is_small_where_it_is_slow(tars, monkeypatch, whole, first, a_sample, sizes):
    monkeypatch.setattr(module, "SLOW", 0.015)
    tried = []

    def stream(paths, size):
        names = [str(i) for i in range(size)]
        yield UnitBatch(tars[0], ImageTextBatch(None, None, names, names, names, names), last=False)

    def try_out(batch):
        time.sleep((0 if tried else first) + a_sample * len(batch.uids))
        tried.append(len(batch.uids))
        return tried[-1]

    about = estimate(tars, 3, stream, try_out, batch_size=16, workers=0, devices=2, whole=whole)
    assert tried == sizes and about.made == sizes[-1] == len(about.first.uids)
    assert about.samples == 60 and str(about) == "2 shards (3 done before), about 60 samples"
    assert about.seconds == pytest.approx(60 * a_sample / 2, rel=0.3, abs=0.1)


def test_no_good_sample(tars):
    def stream(paths, size):
        yield UnitBatch(tars[0], ImageTextBatch(None, None, [], [], [], []), last=True)

    about = estimate(tars, 0, stream, lambda batch: 1 / 0, batch_size=8, workers=0, devices=1, whole=False)
    assert about.seconds is None and about.made is None and about.takes(1, "cpu") == ""


def test_tars_that_cannot_be_had_are_left_to_the_work(tars):
    asked = []

    def stream(paths, size):
        asked.append(list(paths))
        yield UnitBatch(tars[0], ImageTextBatch(None, None, [], [], [], []), last=True)

    about = estimate(expand(["pipe:exit 3", tars[1]]), 0, stream, print, batch_size=8, workers=0, devices=1)
    assert about.tars == 2 and asked == [[tars[1]]]
    with pytest.raises(InputError, match="ended with status 3"):
        estimate(expand("pipe:exit 3"), 0, stream, print, batch_size=8, workers=0, devices=1)
