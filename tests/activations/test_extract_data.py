"""Extraction from data that lies in other ways than in plain tars: the same rows, bit for bit."""

import os
import signal
import time

import fsspec
import pytest
import torch

from mmsae.activations import ActivationStore, extract
from mmsae.remote import http, retry
from mmsae.shards import ShardWriter
from mmsae.types import InputError
from tests.helpers.data_kinds import KINDS, laid_out
from tests.helpers.stores import FakeHost, contents, image_bytes
from tests.helpers.web import serving

QUIET = {"workers": 0, "progress": False, "batch_size": 4}


@pytest.fixture
def shards(tmp_path):
    with ShardWriter(tmp_path / "tars", "s", per_shard=10) as w:
        for i in range(30):
            w.write(f"{i:05d}", {"png": image_bytes(i), "txt": f"picture {i}", "json": {"uid": f"{i * 7919:032x}"}})
    return w.paths


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_rows_whatever_the_data_lies_in(kind, shards, tmp_path):
    plain = ActivationStore(extract(FakeHost(), [str(p) for p in shards], tmp_path / "plain", **QUIET))
    pattern = laid_out(kind, shards, tmp_path / "data")
    out = extract(FakeHost(), pattern, tmp_path / "out", **QUIET)
    found = ActivationStore(out)
    assert found.uids == plain.uids and found.keys == plain.keys and found.captions == plain.captions
    for m in plain.modalities:
        assert torch.equal(found.load(modality=m), plain.load(modality=m))
    parts = {n: b for n, b in contents(out).items() if n.endswith(".safetensors")}
    assert parts and parts == {n: b for n, b in contents(tmp_path / "plain").items() if n.endswith(".safetensors")}
    again = extract(FakeHost(), pattern, tmp_path / "again", **QUIET | {"workers": 2})
    assert contents(again) == contents(out)
    extract(FakeHost(), pattern, out, **QUIET)  # the same job: nothing to do


@pytest.fixture
def elsewhere(shards, tmp_path, monkeypatch):
    """The tars on a server, in a store in memory, and behind a command."""
    monkeypatch.setenv("MMSAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv(http.ALLOWED, "127.0.0.1")
    monkeypatch.setattr(retry, "FIRST_WAIT", 0.01)
    files = fsspec.filesystem("memory")
    with serving() as server:
        for path in shards:
            server.files[f"/{path.name}"] = path.read_bytes()
            files.pipe(f"/bucket/{path.name}", path.read_bytes())
        names = f"{{{','.join(p.name for p in shards)}}}"
        yield (
            server,
            {
                "http": f"{server.url}/{names}",
                "memory": "memory://bucket/*.tar",
                "pipe": f"pipe:cat {tmp_path}/tars/{names}",
            },
        )
    files.store.clear()
    files.pseudo_dirs[:] = [""]


def parts(folder):
    return {n: b for n, b in contents(folder).items() if n.startswith("shard-")}


@pytest.mark.parametrize("kind", ["http", "memory", "pipe"])
def test_the_same_bytes_wherever_the_tars_lie(kind, elsewhere, shards, tmp_path):
    server, patterns = elsewhere
    plain = extract(FakeHost(), [str(p) for p in shards], tmp_path / "plain", **QUIET)
    server.faults[f"/{shards[1].name}"] = ["cut", "503"]
    out = extract(FakeHost(), patterns[kind], tmp_path / "out", **QUIET | {"workers": 2})
    assert parts(out) == parts(plain) and len(parts(out)) == 6


def test_another_version_is_another_job(elsewhere, shards, tmp_path):
    server, patterns = elsewhere
    extract(FakeHost(), patterns["http"], tmp_path / "out", **QUIET)
    server.tags[f"/{shards[2].name}"] = '"new"'
    with pytest.raises(InputError, match=r"of another job: its shards\[2\] is .*new.*choose another --out"):
        extract(FakeHost(), patterns["http"], tmp_path / "out", **QUIET)


def test_a_transfer_that_fails_for_good_leaves_what_is_finished(elsewhere, shards, tmp_path):
    server, patterns = elsewhere
    plain = extract(FakeHost(), [str(p) for p in shards], tmp_path / "plain", **QUIET)
    server.faults[f"/{shards[1].name}"] = ["cut"] * 1000
    with pytest.raises(InputError, match=r"the transfer was cut after .* what is finished is kept"):
        extract(FakeHost(), patterns["http"], tmp_path / "out", **QUIET)
    server.faults.clear()
    assert parts(extract(FakeHost(), patterns["http"], tmp_path / "out", **QUIET)) == parts(plain)


def test_killed_in_the_middle_of_a_transfer_it_goes_on(elsewhere, shards, tmp_path):
    server, patterns = elsewhere
    plain = extract(FakeHost(), [str(p) for p in shards], tmp_path / "plain", **QUIET)
    server.slow[f"/{shards[1].name}"] = 30
    pid = os.fork()
    if pid == 0:
        try:
            extract(FakeHost(), patterns["http"], tmp_path / "out", **QUIET)
        finally:
            os._exit(0)
    until = time.monotonic() + 60
    while not list((tmp_path / "cache").rglob(f"*{shards[1].name}*.part")) and time.monotonic() < until:
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    server.slow.clear()
    assert parts(extract(FakeHost(), patterns["http"], tmp_path / "out", **QUIET)) == parts(plain)
    assert server.sent[f"/{shards[0].name}"] == 1  # what was here stayed here
