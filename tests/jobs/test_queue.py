"""Parts of a batch queue: which they are, what each does, and when they are merged."""

import subprocess
import sys
import time

import pytest

from mmsae.errors import InputError
from mmsae.jobs import JobFolder
from mmsae.jobs.queue import Merging, PartOf, parse_part, part_of_array
from mmsae.jobs.tally import UnitsFailed
from mmsae.jobs.units import do_missing


@pytest.mark.parametrize("text", ["3/2", "0/2", "1/0", "-1/2", "1", "1/2/3", "a/b", "1.5/2"])
def test_what_is_no_part_is_refused(text):
    with pytest.raises(InputError, match=f"part is {text}; it is I/N, the I-th of N parts"):
        parse_part(text)
    assert parse_part("2/3") == (2, 3)


def slurm(task, low, high, step=1, count=None):
    count = len(range(low, high + 1, step)) if count is None else count
    given = {"ID": task, "MIN": low, "MAX": high, "STEP": step, "COUNT": count}
    return {f"SLURM_ARRAY_TASK_{k}": str(v) for k, v in given.items()}


def test_a_task_of_an_array_is_a_part_wherever_its_numbers_begin():
    assert [part_of_array(slurm(i, 0, 3)) for i in range(4)] == ["1/4", "2/4", "3/4", "4/4"]
    assert [part_of_array(slurm(i, 1, 3)) for i in (1, 2, 3)] == ["1/3", "2/3", "3/3"]
    assert [part_of_array(slurm(i, 10, 30, 10)) for i in (10, 20, 30)] == ["1/3", "2/3", "3/3"]
    assert part_of_array({}) == "" and part_of_array(slurm(7, 7, 7)) == ""
    assert part_of_array({"SLURM_JOB_ID": "1", "HOME": "x"}) == ""


def test_an_array_with_gaps_is_no_set_of_parts():
    with pytest.raises(InputError, match=r"SLURM_ARRAY_TASK_ID=7, .*COUNT=3: an array with gaps; say --part I/N"):
        part_of_array(slurm(7, 1, 7, count=3))  # --array=1,3,7
    with pytest.raises(InputError, match="an array with gaps"):
        part_of_array(slurm(4, 0, 6, step=3, count=3))


@pytest.fixture
def paths(tmp_path):
    for c in "abcde":
        (tmp_path / f"{c}.tar").write_bytes(c.encode())
    return [str(tmp_path / f"{c}.tar") for c in "abcde"]


class TwoPasses:
    """A job whose second pass needs what is merged of the first."""

    def __init__(self, paths, out, broken=""):
        self.folder = JobFolder(out, {"n": len(paths)}, "mmsae test", result="results.json", beside=True)
        self.passes, self.broken = [self.folder.parts(paths, kind) for kind in ("first", "second")], broken
        self.mark, self.did = self.folder.work / "merged.txt", []

    def make(self, kind, path):
        with open(path, "rb") as f:
            letter = f.read()
        if letter.decode() in self.broken:
            raise InputError(f"{letter.decode()} is broken")
        self.did.append((kind, letter.decode()))
        return letter if kind == 0 else letter + self.mark.read_bytes()

    def run(self, engine):
        def here(kind):
            return lambda share: self.passes[kind].work(lambda path: self.make(kind, path), share, progress=False)

        def total():
            self.mark.write_bytes(b"".join(p.read_bytes() for p in self.passes[0].files()))

        def finish():
            self.folder.draft.mkdir()
            result = b"".join(p.read_bytes() for p in self.passes[1].files())
            (self.folder.draft / "results.json").write_bytes(result)
            self.folder.publish()

        with engine, self.folder.under(engine):
            do_missing(engine, self.passes[0].tally, here(0), None)
            engine.merge(self.mark.exists, total)
            do_missing(engine, self.passes[1].tally, here(1), None)
            engine.merge(lambda: False, finish)
            return "finished"
        return "waits"


def test_parts_merge_parts_merge(paths, tmp_path, capsys):
    out, n = tmp_path / "out", 7  # more parts than tars

    def part(i, **more):
        job = TwoPasses(paths, out, **more)
        assert job.run(PartOf(i, n)) == "waits"
        return job.did

    def merge():
        return TwoPasses(paths, out).run(Merging())

    with pytest.raises(InputError, match=r"5 of 5 shards are not done, so there is nothing to merge: .*a\.tar"):
        merge()
    assert not (tmp_path / "out.partial").exists()
    assert [part(i) for i in range(2, n + 1)] == [[(0, "b")], [(0, "c")], [(0, "d")], [(0, "e")], [], []]
    with pytest.raises(InputError, match=r"1 of 5 shards are not done, so there is nothing to merge: .*a\.tar;"):
        merge()
    assert part(2) == [] and part(1) == [(0, "a")]
    assert capsys.readouterr().out.endswith("part 1/7 of first: done; next: --merge\n")
    assert part(1) == []  # safe to say again, and no part goes on before the merge
    assert "nothing is left to do before the parts are merged; next: --merge" in capsys.readouterr().out
    assert merge() == "waits"
    assert "merged what was there; next: the parts again, for 5 shards of second" in capsys.readouterr().out
    with pytest.raises(InputError, match="5 of 5 shards are not done"):
        merge()
    assert [part(i) for i in range(1, n + 1)] == [[(1, c)] for c in "abcde"] + [[], []]
    assert merge() == "finished" and [p.name for p in out.iterdir()] == ["results.json"]
    assert (out / "results.json").read_text() == "".join(f"{c}abcde" for c in "abcde")
    assert not (tmp_path / "out.partial").exists()


def test_a_part_goes_on_without_a_unit_that_fails_and_the_merge_says_why(paths, tmp_path):
    job = TwoPasses(paths, tmp_path / "out", broken="b")
    with pytest.raises(UnitsFailed, match=r"1 of 5 shards failed, the others are done.*b\.tar: b is broken"):
        job.run(PartOf(1, 1))
    assert [c for _, c in job.did] == list("acde")
    with pytest.raises(InputError, match=r"1 of 5 shards are not done.*1 of them failed: .*b\.tar: b is broken"):
        TwoPasses(paths, tmp_path / "out").run(Merging())
    assert TwoPasses(paths, tmp_path / "out").run(PartOf(1, 1)) == "waits"


HELD = """
import sys, time
from mmsae.jobs.queue import PartOf
from tests.jobs.test_queue import TwoPasses

class Slow(TwoPasses):
    def make(self, kind, path):
        print("at work", flush=True)
        time.sleep(60)

Slow(sys.argv[2:], sys.argv[1]).run(PartOf(1, 2))
"""


def test_a_part_that_runs_is_not_run_twice_nor_merged(paths, tmp_path):
    other = subprocess.Popen(
        [sys.executable, "-c", HELD, str(tmp_path / "out"), *paths], stdout=subprocess.PIPE, text=True
    )
    try:
        while "at work" not in other.stdout.readline():
            time.sleep(0.05)
        with pytest.raises(InputError, match="another running process is working on part 1/2"):
            TwoPasses(paths, tmp_path / "out").run(PartOf(1, 2))
        with pytest.raises(InputError, match="other running processes are working on this job"):
            TwoPasses(paths, tmp_path / "out").run(Merging())
        with pytest.raises(InputError, match="part 1/2 is running and this is part 2/3, so that some shards"):
            TwoPasses(paths, tmp_path / "out").run(PartOf(2, 3))
        assert TwoPasses(paths, tmp_path / "out").run(PartOf(2, 2)) == "waits"
    finally:
        other.kill()
        other.wait()
    job = TwoPasses(paths, tmp_path / "out")
    assert job.run(PartOf(1, 3)) == "waits" and [c for _, c in job.did] == ["a"]  # no other number is running now
    job = TwoPasses(paths, tmp_path / "out")
    assert job.run(PartOf(1, 2)) == "waits" and [c for _, c in job.did] == list("ce")
