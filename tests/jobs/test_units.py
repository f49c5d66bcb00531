import errno
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mmsae.jobs import Parts, units
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
    one = Parts(tmp_path / "one", paths).run(work, progress=False)
    assert [p.read_bytes() for p in one] == [bytes([i]) * 3 for i in range(5)]
    for rank in range(7):  # more ranks than tars
        many = Parts(tmp_path / "many", paths).run(work, rank=rank, world=7, progress=False)
    assert [(p.name, p.read_bytes()) for p in many] == [(p.name, p.read_bytes()) for p in one]
    assert sorted(p.name for p in (tmp_path / "many").iterdir()) == [p.name for p in one]


def test_only_what_is_missing_is_done_again(tmp_path, paths):
    asked = []

    def counting(path):
        asked.append(path)
        return lambda out: out.write_bytes(b"x")

    parts = Parts(tmp_path / "out", paths, ".npy").run(counting, progress=False)
    parts[2].unlink()
    Parts(tmp_path / "out", paths, ".npy").run(counting, progress=False)
    assert asked == [*paths, paths[2]] and parts[2].read_bytes() == b"x"


def test_a_shard_that_was_replaced_is_another_unit(tmp_path, paths):
    before = units(paths)
    Parts(tmp_path / "out", paths).run(work, progress=False)
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
        Parts(tmp_path / "out", paths).run(failing, progress=False)
    assert list((tmp_path / "out").iterdir()) == []


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
Parts(out, paths).run(work, progress=False)
"""


def test_killed_while_writing_a_part(tmp_path, paths):
    out = tmp_path / "out"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(out), *paths])
    assert killed.returncode == -signal.SIGKILL
    assert [Parts(out, []).done(u) for u in units(paths)] == [True, True, False, False, False]
    asked = []
    parts = Parts(out, paths).run(lambda p: asked.append(p) or work(p), progress=False)
    assert asked == paths[2:] and [p.read_bytes() for p in parts] == [work(p) for p in paths]
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in Parts(out, paths).files())
