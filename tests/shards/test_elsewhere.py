import os
import pickle
import signal
import time

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmsae.jobs.units import units
from mmsae.remote import cache, http, retry
from mmsae.shards import (
    FaultLog,
    Source,
    count_samples,
    expand,
    identity,
    make_pipeline,
    read_shard,
    table,
    unit_batches,
)
from mmsae.shards.batches import Reader
from mmsae.types import InputError
from tests.helpers.web import serving


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("MMSAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv(http.ALLOWED, "127.0.0.1")
    monkeypatch.setattr(retry, "FIRST_WAIT", 0.01)
    return tmp_path


@pytest.fixture
def server(place):
    with serving() as server:
        yield server


@pytest.fixture
def tars(server, place, make):
    """Three tars of five samples each, on this machine and on the server."""
    for t in range(3):
        path = make.tar(place / f"{t:03d}.tar", make.pairs(5, 5 * t))
        server.files[f"/d/{t:03d}.tar"] = open(path, "rb").read()
    return [str(place / f"{t:03d}.tar") for t in range(3)]


def read(pattern, log=None, **options):
    log = log or FaultLog()
    return [(s.uid, s.key, s.shard, s.caption, s.raw) for u in expand(pattern) for s in read_shard(u, log, **options)]


def test_urls_with_braces_are_the_same_samples_as_tars_here(tars, server):
    url = f"{server.url}/d/{{000..002}}.tar"
    found = expand(url)
    assert [s.name for s in found] == ["000.tar", "001.tar", "002.tar"] and found[1] == f"{server.url}/d/001.tar"
    assert server.sent == {} and [s.size for s in found] == [os.path.getsize(t) for t in tars]
    log = FaultLog()
    assert read(url, log) == read(tars) and not log.counts
    assert read(url) == read(tars) and set(server.sent.values()) == {1}  # from the cache
    for workers in (0, 2):
        keys = sorted(k for p in unit_batches(expand(url), None, None, 2, need=("image",), workers=workers)
                      for k in p.batch.keys)  # fmt: skip
        assert keys == [f"{i:05d}" for i in range(15)]


def test_the_identity_is_url_size_and_etag(tars, server):
    url = f"{server.url}/d/000.tar"
    (before,) = expand(url)
    assert identity([before]) == [["000.tar", before.size, f"{url} {before.remote.tag}"]]
    assert identity(pickle.loads(pickle.dumps([before]))) == identity([before])
    server.tags["/d/000.tar"] = '"new"'
    (after,) = expand(url)
    assert identity([after]) != identity([before]) and units([after])[0].name != units([before])[0].name
    with pytest.raises(InputError, match="has changed since it was found"):
        read([before])


def test_training_reads_them_too(tars, server, make):
    reader = Reader.of(make.transform, make.tokenize, 4)
    url = f"{server.url}/d/{{000..002}}.tar"
    here = make_pipeline([Source(tars)], reader, train=True, epoch_samples=12, seed=3)
    there = make_pipeline([Source(url)], reader, train=True, epoch_samples=12, seed=3)
    assert [b.keys for b in here] == [b.keys for b in there]


def test_a_cut_transfer_is_an_error_and_never_the_end_of_a_shard(tars, server):
    server.faults["/d/001.tar"] = ["cut"]
    assert len(read(f"{server.url}/d/{{000..002}}.tar")) == 15
    server.files["/d/003.tar"] = server.files["/d/002.tar"]
    server.faults["/d/003.tar"] = ["cut"] * 100
    with pytest.raises(InputError, match=r"003\.tar: the transfer was cut after \d+ of \d+ bytes"):
        read(f"{server.url}/d/003.tar")
    with pytest.raises(InputError, match="the transfer was cut"):  # from a worker, as one sentence
        list(unit_batches(expand(f"{server.url}/d/003.tar"), None, None, 2, need=("image",), workers=1))
    assert not [p for p in cache.folder().glob("*") if "003.tar" in p.name]


def test_a_shard_that_lies_there_cut_is_counted_as_here(tars, server):
    server.files["/d/cut.tar"] = server.files["/d/000.tar"][: 512 * 12]
    log = FaultLog()
    assert 0 < len(read(f"{server.url}/d/cut.tar", log)) < 5 and log.counts == {"truncated_shard": 1}


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("d/{000..004}.tar", r"d/003\.tar cannot be read: the server answers 404"),
        ("d/", "cannot be listed, as no web server can"),
        ("d/{000.tar", "do not balance"),
    ],
)
def test_what_is_not_there(tars, server, name, sentence):
    with pytest.raises(InputError, match=sentence):
        expand(f"{server.url}/{name}")


def test_too_large_for_the_cache_is_said_before(tars, server, monkeypatch):
    monkeypatch.setenv(cache.SIZE, "0.000001")
    with pytest.raises(InputError, match="set MMSAE_CACHE_GB to more"):
        expand(f"{server.url}/d/000.tar")
    assert server.sent == {}


def test_a_cache_that_holds_one_shard_is_enough(tars, server, monkeypatch):
    monkeypatch.setenv(cache.SIZE, str(os.path.getsize(tars[0]) * 1.5 / 1e9))
    for _ in range(2):
        assert len(read(f"{server.url}/d/{{000..002}}.tar")) == 15
    assert set(server.sent.values()) == {2} and len(list(cache.folder().glob("*.tar"))) == 1


def test_tars_of_one_name_are_told_apart(tars, server):
    for path in ("/a/s/0.tar", "/b/s/0.tar"):
        server.files[path] = server.files["/d/000.tar"]
    found = expand([f"{server.url}/{{a,b}}/s/0.tar"])
    assert [s.name for s in found] == ["a/s/0.tar", "b/s/0.tar"]
    assert len({row[0] for row in read(found)}) == 10


@pytest.fixture
def memory(tars, place):
    files = fsspec.filesystem("memory")
    for t, path in enumerate(tars):
        files.pipe(f"/bucket/train/{t:03d}.tar", open(path, "rb").read())
    files.pipe("/bucket/train/notes.txt", b"no shard")
    yield files
    files.store.clear()
    files.pseudo_dirs[:] = [""]


@pytest.mark.parametrize("pattern", ["train/{000..002}.tar", "train/*.tar", "train", "train/", "t*/0*"])
def test_globs_and_folders_of_object_stores(memory, tars, pattern):
    assert read(f"memory://bucket/{pattern}") == read(tars)


@pytest.mark.parametrize(
    ("pattern", "sentence"),
    [
        ("train/x*.tar", r"No shard matches memory://bucket/train/x\*\.tar: there are 0 other files"),
        ("train/*.txt", r"there are 1 other files, such as .*notes\.txt; shards end in"),
        ("train/009.tar", "does not exist"),
        ("none", "does not exist"),
    ],
)
def test_what_is_not_in_an_object_store(memory, pattern, sentence):
    with pytest.raises(InputError, match=sentence):
        expand(f"memory://bucket/{pattern}")


def test_pipes(tars, place):
    log = FaultLog()
    pattern = f"pipe:cat {place}/{{000..002}}.tar"
    assert read(pattern, log) == read(tars) and not log.counts
    (gz,) = expand(f"pipe:gzip -c {tars[0]}")
    assert gz.name == "000.tar" and [r[1:4] for r in read([gz])] == [r[1:4] for r in read(tars[:1])]
    with pytest.raises(InputError, match=r"ended with status 5"):
        read(f"pipe:head -c 2000 {tars[0]}; exit 5")
    assert count_samples(pattern) == 15
    assert len({u.name for u in units(expand(pattern))}) == 3
    assert identity(expand(pattern))[0][1] == 0 and "cat" not in identity(expand(pattern))[0][2]


def test_tables_elsewhere_are_split_by_their_footer_alone(server, place, make, monkeypatch):
    rows = {"image": [{"bytes": make.picture((i, 0, 0))} for i in range(12)], "caption": [f"no {i}" for i in range(12)]}
    pq.write_table(pa.table(rows), place / "t.parquet", row_group_size=3)
    server.files["/t.parquet"] = (place / "t.parquet").read_bytes()
    here = read(str(place / "t.parquet"))
    assert read(f"{server.url}/t.parquet") == here and server.sent["/t.parquet"] == 1
    monkeypatch.setattr(table, "UNIT_BYTES", 500)
    local, there = expand(str(place / "t.parquet")), expand(f"{server.url}/t.parquet")
    assert len(there) == len(local) > 1 and [u.groups for u in there] == [u.groups for u in local]
    assert [u.name for u in there] == [u.name for u in local]
    assert [r[:2] for r in read(there)] == [r[:2] for r in here] and server.sent["/t.parquet"] == 1
    monkeypatch.setattr("mmsae.shards.elsewhere.FOOTER", 100)  # the footer is longer: it is asked for again
    assert [u.groups for u in expand(f"{server.url}/t.parquet")] == [u.groups for u in local]
    server.faults["/t.parquet"] = ["no ranges"]
    assert len(expand(f"{server.url}/t.parquet")) == 1
    files = fsspec.filesystem("memory")
    files.pipe("/m/t.parquet", server.files["/t.parquet"])
    assert [u.groups for u in expand("memory://m")] == [u.groups for u in local]
    files.store.clear()


def test_a_job_that_is_killed_in_a_transfer_goes_on(tars, server, place):
    url = f"{server.url}/d/{{000..002}}.tar"
    server.slow["/d/001.tar"] = 20
    pid = os.fork()
    if pid == 0:
        try:
            read(url)
        finally:
            os._exit(0)
    until = time.monotonic() + 20
    while not (server.standing["/d/001.tar"] and any(cache.folder().glob("*.part"))) and time.monotonic() < until:
        time.sleep(0.02)
    assert server.standing["/d/001.tar"]
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    server.slow.clear()
    assert server.sent["/d/000.tar"] == 1
    assert read(url) == read(tars) and server.sent["/d/000.tar"] == 1 and not list(cache.folder().glob("*.part"))
