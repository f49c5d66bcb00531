"""Work dealt out among processes: here where one is enough, elsewhere where not, and the first failure ends all."""

import os
from pathlib import Path

import pytest

from mmsae.jobs.processes import Local
from mmsae.types import InputError


def elsewhere(rank, folder):
    def work(share):
        for unit in share.units:
            if unit == 13:
                raise InputError("unit 13 is broken")
            (Path(folder) / f"{unit}-{rank}-{os.getpid()}").touch()

    return work


def test_one_unit_or_one_process_is_done_here(tmp_path):
    shares = []
    for size, todo in ((1, [4, 5]), (2, [7])):
        with Local(size) as processes:
            processes.run(None, todo, shares.append, elsewhere, str(tmp_path))
    assert [s.units for s in shares] == [[4, 5], [7]] and all(s.lead and not s.stopped() for s in shares)


@pytest.mark.slow
def test_units_are_dealt_out_and_a_failure_is_told(tmp_path):
    with Local(2) as processes:
        processes.lock = tmp_path / "workers.lock"
        processes.run(None, [1, 2, 3], print, elsewhere, str(tmp_path))
        done = [p.name.split("-") for p in tmp_path.glob("*-*")]
        assert sorted(int(unit) for unit, *_ in done) == [1, 2, 3] and str(os.getpid()) not in {pid for *_, pid in done}
        with pytest.raises(InputError, match="unit 13 is broken"):
            processes.run(None, [12, 13], print, elsewhere, str(tmp_path))
