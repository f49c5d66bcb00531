import errno
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mmsae.jobs import done, part_path, run_units, units
from mmsae.types import InputError


@pytest.fixture
def paths(tmp_path):
    found = [tmp_path / folder / "00000.tar" for folder in "abcde"]
    for i, path in enumerate(found):
        path.parent.mkdir()
        path.write_bytes(bytes([i]))
    return [str(p) for p in found]


def work(path):
    return Path(path).read_bytes() * 3


def test_parts_are_in_the_order_of_the_tars_whatever_the_ranks(tmp_path, paths):
    one = run_units(paths, tmp_path / "one", work, progress=False)
    assert [p.read_bytes() for p in one] == [bytes([i]) * 3 for i in range(5)]
    for rank in range(7):  # more ranks than tars
        many = run_units(paths, tmp_path / "many", work, rank=rank, world=7, progress=False)
    assert [(p.name, p.read_bytes()) for p in many] == [(p.name, p.read_bytes()) for p in one]
    assert sorted(p.name for p in (tmp_path / "many").iterdir()) == [p.name for p in one]


def test_only_what_is_missing_is_done_again(tmp_path, paths):
    asked = []

    def counting(path):
        asked.append(path)
        return lambda out: out.write_bytes(b"x")

    parts = run_units(paths, tmp_path / "out", counting, suffix=".npy", progress=False)
    parts[2].unlink()
    run_units(paths, tmp_path / "out", counting, suffix=".npy", progress=False)
    assert asked == [*paths, paths[2]] and parts[2].read_bytes() == b"x"


def test_a_shard_that_was_replaced_is_another_unit(tmp_path, paths):
    before = units(paths)
    run_units(paths, tmp_path / "out", work, progress=False)
    Path(paths[1]).write_bytes(b"longer")
    after = units(paths)
    assert [done(tmp_path / "out", u) for u in after] == [True, False, True, True, True]
    assert before[0] == after[0] and before[1].name != after[1].name


def test_a_failed_unit_leaves_nothing(tmp_path, paths):
    def failing(path):
        def write(out):
            out.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")

        return write

    with pytest.raises(InputError, match=r"00000.*\.part: no space left"):
        run_units(paths, tmp_path / "out", failing, progress=False)
    assert list((tmp_path / "out").iterdir()) == []


KILLED = """
import os, signal, sys
from mmsae.jobs import run_units
paths, out = sys.argv[2:], sys.argv[1]
def work(path):
    def write(target):
        data = open(path, "rb").read() * 3
        with open(target, "wb") as f:
            f.write(data[:1]); f.flush()
            if path == paths[2]:
                os.kill(os.getpid(), signal.SIGKILL)
            f.write(data[1:])
    return write
run_units(paths, out, work, progress=False)
"""


def test_killed_while_writing_a_part(tmp_path, paths):
    out = tmp_path / "out"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(out), *paths])
    assert killed.returncode == -signal.SIGKILL
    assert [done(out, u) for u in units(paths)] == [True, True, False, False, False]
    asked = []
    parts = run_units(paths, out, lambda p: asked.append(p) or work(p), progress=False)
    assert asked == paths[2:] and [p.read_bytes() for p in parts] == [work(p) for p in paths]
    assert sorted(p.name for p in out.iterdir()) == sorted(part_path(out, u).name for u in units(paths))
