import errno
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mmsae.jobs import Parts, units
from mmsae.jobs.processes import Local
from mmsae.jobs.units import do_missing
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


def do(parts, make):
    do_missing(Local(), parts.tally, lambda share: parts.work(make, share, progress=False), None)
    return parts.files()


def test_parts_are_in_the_order_of_the_tars(tmp_path, paths):
    made = do(Parts(tmp_path / "out", paths), work)
    assert [p.read_bytes() for p in made] == [bytes([i]) * 3 for i in range(5)]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [*(p.name for p in made), "units.json"]


def test_only_what_is_missing_is_done_again(tmp_path, paths):
    asked = []

    def counting(path):
        asked.append(path)
        return lambda out: out.write_bytes(b"x")

    parts = do(Parts(tmp_path / "out", paths, ".npy"), counting)
    parts[2].unlink()
    do(Parts(tmp_path / "out", paths, ".npy"), counting)
    assert asked == [*paths, paths[2]] and parts[2].read_bytes() == b"x"


def test_a_shard_that_was_replaced_is_another_unit(tmp_path, paths):
    before = units(paths)
    do(Parts(tmp_path / "out", paths), work)
    Path(paths[1]).write_bytes(b"longer")
    after = units(paths)
    assert [Parts(tmp_path / "out", []).done(u) for u in after] == [True, False, True, True, True]
    assert before[0] == after[0] and before[1].name != after[1].name


def test_a_failed_unit_leaves_nothing(tmp_path, paths):
    def failing(path):
        def write(out):
            out.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")

        return write

    with pytest.raises(InputError, match=r"00000.*\.part: no space left"):
        do(Parts(tmp_path / "out", paths), failing)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["units.json"]


KILLED = """
import os, signal, sys
from mmsae.jobs import Parts
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
from mmsae.jobs.units import Share
parts = Parts(out, paths)
parts.work(work, Share(list(range(5))), progress=False)
"""


def test_killed_while_writing_a_part(tmp_path, paths):
    out = tmp_path / "out"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(out), *paths])
    assert killed.returncode == -signal.SIGKILL
    assert [Parts(out, []).done(u) for u in units(paths)] == [True, True, False, False, False]
    asked = []
    parts = do(Parts(out, paths), lambda p: asked.append(p) or work(p))
    assert asked == paths[2:] and [p.read_bytes() for p in parts] == [work(p) for p in paths]
    assert sorted(p.name for p in out.iterdir()) == sorted(["units.json", *(p.name for p in Parts(out, paths).files())])
