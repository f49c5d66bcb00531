import multiprocessing
import os
import shutil
import time

import pytest

from mmsae.errors import InputError
from mmsae.remote import cache, places
from mmsae.remote.cache import cached, check_room


@pytest.fixture
def remotes(server):
    """Four files of a megabyte."""
    for i in range(4):
        server.files[f"/{i}.tar"] = bytes([i]) * 1_000_000
    return places.find([f"{server.url}/{i}.tar" for i in range(4)])


def held(folder):
    return sorted(int(p.name.split("-")[-1][0]) for p in folder.glob("*.tar"))


def test_brought_once_and_whole(remotes, server, cache_folder):
    for _ in range(3):
        with cached(remotes[1]) as file:
            assert file.read() == server.files["/1.tar"]
    assert server.sent["/1.tar"] == 1 and held(cache_folder) == [1] and not list(cache_folder.glob("*.part"))


def test_what_was_used_longest_ago_goes(remotes, server, cache_folder, monkeypatch):
    monkeypatch.setenv(cache.SIZE, "0.0025")
    first = cached(remotes[0])
    cached(remotes[1]).close()
    for n, path in enumerate(sorted(cache_folder.glob("*.tar"), key=lambda p: p.name[-5])):
        os.utime(path, (n, n))
    cached(remotes[0]).close()  # used again, so that 1 goes
    cached(remotes[2]).close()
    assert held(cache_folder) == [0, 2]
    cached(remotes[3]).close()
    assert held(cache_folder) == [2, 3]
    assert first.read() == server.files["/0.tar"]  # who reads it keeps it
    first.close()


def test_too_large_is_said_before(remotes, monkeypatch, cache_folder):
    check_room(remotes)
    monkeypatch.setenv(cache.SIZE, "0.0005")
    with pytest.raises(
        InputError, match=r"0\.tar has 1\.0 MB, and the cache .* may hold 500\.0 kB: set MMSAE_CACHE_GB"
    ):
        check_room(remotes)
    with pytest.raises(InputError, match="MMSAE_CACHE_GB is 'much'"):
        monkeypatch.setenv(cache.SIZE, "much")
        check_room(remotes)
    monkeypatch.delenv(cache.SIZE)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 10**6, 10**6))
    with pytest.raises(InputError, match=r"needs 68\.1 MB and 1\.0 MB can be made free; make room"):
        check_room(remotes)
    monkeypatch.setattr(cache, "PATIENCE", 0)
    with pytest.raises(InputError, match="make room"):
        cached(remotes[0])


def test_a_file_that_is_cut_on_this_disk_is_brought_again(remotes, server, cache_folder):
    cached(remotes[2]).close()
    path = next(cache_folder.glob("*.tar"))
    path.write_bytes(path.read_bytes()[:100])
    with cached(remotes[2]) as file:
        assert file.read() == server.files["/2.tar"]


def test_another_version_is_another_file(remotes, server):
    cached(remotes[0]).close()
    server.files["/0.tar"] = b"z" * 1_000_000
    (now,) = places.find([remotes[0].url])
    assert now.size == remotes[0].size and now.tag != remotes[0].tag
    with cached(now) as file:
        assert file.read() == b"z" * 1_000_000


def bring(remote):
    cached(remote).close()


def test_several_processes_bring_a_file_once(remotes, server, cache_folder):
    fork = multiprocessing.get_context("fork")
    all_of_them = [fork.Process(target=bring, args=(r,)) for r in [remotes[0]] * 3 + [remotes[1]] * 2]
    for p in all_of_them:
        p.start()
    for p in all_of_them:
        p.join(30)
    assert [p.exitcode for p in all_of_them] == [0] * 5 and held(cache_folder) == [0, 1]
    assert (server.sent["/0.tar"], server.sent["/1.tar"]) == (1, 1)


def test_killed_in_the_middle_of_a_transfer(remotes, server, cache_folder):
    server.slow["/0.tar"] = 20
    fork = multiprocessing.get_context("fork")
    killed = fork.Process(target=bring, args=(remotes[0],))
    killed.start()
    until = time.monotonic() + 20
    while not (server.standing["/0.tar"] and any(cache_folder.glob("*.part"))) and time.monotonic() < until:
        time.sleep(0.02)
    killed.kill()
    killed.join()
    assert [p.name[-5:] for p in cache_folder.glob("*.part")] == [".part"] and held(cache_folder) == []
    server.slow.clear()
    cached(remotes[1]).close()  # another file: what the killed one left goes
    assert not list(cache_folder.glob("*.part"))
    with cached(remotes[0]) as file:
        assert file.read() == server.files["/0.tar"]
