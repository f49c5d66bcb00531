"""Object stores as s3fs sees them, against a small S3 on this machine."""

from pathlib import Path

import pytest
import torch

from mmsae import SAE
from mmsae.errors import InputError
from mmsae.remote import places
from mmsae.remote.delivery import delivered
from mmsae.sae import TopK
from mmsae.sae.fingerprint import sae_fingerprint
from mmsae.shards import FaultLog, expand, identity, read_shard, unit_batches
from tests.helpers.s3 import KEY, SECRET, serving
from tests.shards.conftest import pairs, tar

s3fs = pytest.importorskip("s3fs", reason="the extra remote is not installed")


@pytest.fixture
def store(cache_folder, monkeypatch, tmp_path):
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    s3fs.S3FileSystem.clear_instance_cache()
    with serving() as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        server.buckets["b"] = {}
        for t in range(3):
            path = tar(tmp_path / f"{t:03d}.tar", pairs(5, 5 * t))
            server.buckets["b"][f"d/{t:03d}.tar"] = open(path, "rb").read()
        server.here = str(tmp_path)
        yield server
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize("pattern", ["d/{000..002}.tar", "d/*.tar", "d", "*/00*.tar"])
def test_the_same_samples_as_tars_here(store, pattern):
    def read(paths):
        return [(s.uid, s.key, s.raw) for u in expand(paths) for s in read_shard(u, FaultLog())]

    assert read(f"s3://b/{pattern}") == read(f"{store.here}/{{000..002}}.tar")


def test_workers_read_it_too(store):
    expand("s3://b/d")  # the main process has talked to the store before it forks
    found = list(unit_batches(expand("s3://b/d"), None, None, 2, need=("image",), workers=2))
    assert len([k for p in found for k in p.batch.keys]) == 15


def test_the_identity_has_the_etag_and_a_change_is_refused(store, tmp_path):
    (shard,) = expand("s3://b/d/000.tar")
    assert identity([shard])[0][2].startswith('s3://b/d/000.tar "')
    assert shard.remote == expand("s3://b/d")[0].remote  # asked for alone or listed
    data = store.buckets["b"]["d/000.tar"]
    store.buckets["b"]["d/000.tar"] = b"x" + data[1:]
    with pytest.raises(InputError, match="has changed since it was found"):
        places.bring(shard.remote, tmp_path / "x")


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("s3://nobucket/a.tar", "s3://nobucket/a.tar.* does not exist"),
        ("s3://nobucket/d", "s3://nobucket/d.* does not exist"),
        ("s3://b/d/009.tar", "does not exist"),
    ],
)
def test_what_is_not_there(store, url, sentence):
    with pytest.raises(InputError, match=sentence):
        expand(url)


@pytest.mark.parametrize("key", ["AKIDOTHER", ""])
def test_without_credentials(store, monkeypatch, key):
    if key:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", key)
    else:
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    for url in ("s3://b/d/000.tar", "s3://b/d"):
        with pytest.raises(
            InputError, match=f"{url}: no credentials in the environment, or none that may read it"
        ) as told:
            expand(url)
        assert SECRET not in str(told.value)


def test_a_store_that_is_busy_is_asked_again(store):
    store.faults += [(503, "SlowDown")] * 2
    assert len(expand("s3://b/d/{000..002}.tar")) == 3 and store.faults == []


def test_results_are_written_there(store):
    def made(out):
        Path(out).mkdir()
        (Path(out) / "spec.json").write_text("{}")
        (Path(out) / "rows.bin").write_bytes(b"x" * 100_000)

    assert delivered("s3://b/runs/store", {"seed": 0}, made) == "s3://b/runs/store"
    keys = [k.removeprefix("runs/store/") for k in store.order if k.startswith("runs/")]
    assert keys == ["uploading.json", "rows.bin", "spec.json", "uploaded.json"]
    there = {k.removeprefix("runs/store/"): v for k, v in store.buckets["b"].items() if k.startswith("runs/")}
    assert set(there) == {"rows.bin", "spec.json", "uploaded.json"} and there["rows.bin"] == b"x" * 100_000
    assert not any(SECRET in v.decode(errors="replace") for v in there.values())
    with pytest.raises(InputError, match="does not exist"):
        delivered("s3://nobucket/store", {"seed": 0}, lambda out: pytest.fail("worked before it looked"))


def test_an_sae_folder(store, tmp_path):
    torch.manual_seed(0)
    sae = SAE(8, 32, modalities=["image"], selector=TopK(3))
    sae.save_pretrained(tmp_path / "sae")
    store.buckets["b"] |= {f"saes/one/{p.name}": p.read_bytes() for p in (tmp_path / "sae").iterdir()}
    assert sae_fingerprint(SAE.from_pretrained("s3://b/saes/one")) == sae_fingerprint(sae)
    with pytest.raises(InputError, match=r"s3://b/saes/two/cfg\.json does not exist"):
        SAE.from_pretrained("s3://b/saes/two")
