"""Work shared out among processes: here where one is enough, elsewhere where not; units that fail, and other work."""

import os
import signal
from pathlib import Path

import pytest

from mmsae.errors import EndsJob, InputError
from mmsae.jobs.processes import Local
from mmsae.jobs.tally import Tally, UnitsFailed


def tally(folder):
    return Tally(folder, [f"{u}.tar" for u in range(20)], [f"{u}.part" for u in range(20)])


def elsewhere(rank, folder):
    def work(share):
        for unit in share.units:
            if unit == 13:
                raise InputError("unit 13 is broken")
            if unit == 17:
                raise EndsJob("the disk is full")
            if unit == 19:
                os.kill(os.getpid(), signal.SIGKILL)
            (Path(folder) / f"{unit}-{rank}-{os.getpid()}").touch()
            (Path(folder) / f"{unit}.part").touch()

    return work


def test_one_unit_or_one_process_is_done_here(tmp_path):
    shares = []
    for size, todo in ((1, [4, 5]), (2, [7])):
        with Local(size) as processes:
            processes.run(tally(tmp_path), todo, shares.append, elsewhere, str(tmp_path))
    assert [s.units for s in shares] == [[4, 5], [7]] and all(s.lead and not s.stopped() for s in shares)


def test_here_units_that_fail_are_named_and_the_others_done(tmp_path):
    with Local() as processes:
        with pytest.raises(
            UnitsFailed, match=r"1 of 4 shards failed, the others are done.*13\.tar: unit 13 is broken$"
        ):
            processes.run(tally(tmp_path), [12, 13, 14, 15], elsewhere(0, tmp_path), elsewhere)
        assert [u for u in range(20) if u not in tally(tmp_path).missing()] == [12, 14, 15]
        with pytest.raises(EndsJob, match="the disk is full"):
            processes.run(tally(tmp_path), [16, 17, 18], elsewhere(0, tmp_path), elsewhere)
        with pytest.raises(InputError, match=r"^unit 13 is broken$"):
            processes.deal(tally(tmp_path), [13, 14], elsewhere(0, tmp_path), elsewhere)


@pytest.mark.slow
def test_units_are_dealt_out_and_a_failure_is_told(tmp_path):
    with Local(2) as processes:
        processes.locks = (tmp_path / "workers.lock",)
        processes.run(tally(tmp_path), [1, 2, 3], print, elsewhere, str(tmp_path))
        done = [p.name.split("-") for p in tmp_path.glob("*-*")]
        assert sorted(int(unit) for unit, *_ in done) == [1, 2, 3] and str(os.getpid()) not in {pid for *_, pid in done}
        with pytest.raises(
            UnitsFailed, match=r"1 of 5 shards failed, the others are done.*13\.tar: unit 13 is broken$"
        ):
            processes.run(tally(tmp_path), [10, 11, 12, 13, 15], print, elsewhere, str(tmp_path))
        assert [u for u in range(10, 16) if not tally(tmp_path).done(u)] == [13, 14]
        assert list(tally(tmp_path).failed()) == [13]
        with pytest.raises(EndsJob, match="the disk is full"):
            processes.run(tally(tmp_path), [16, 17], print, elsewhere, str(tmp_path))
        with pytest.raises(InputError, match=r"^unit 13 is broken$"):
            processes.deal(tally(tmp_path), [12, 13], print, elsewhere, str(tmp_path))
        processes.run(tally(tmp_path), [4, 5], print, elsewhere, str(tmp_path))  # the same processes go on
        with pytest.raises(InputError, match="a process was killed or crashed, for want of memory perhaps"):
            processes.run(tally(tmp_path), [6, 19], print, elsewhere, str(tmp_path))
        processes.run(tally(tmp_path), [7, 8], print, elsewhere, str(tmp_path))  # others do
        assert all(map(tally(tmp_path).done, (4, 5, 7, 8)))
