"""Data sets of the hub, against a small hub on this machine."""

import fsspec
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmsae.errors import InputError
from mmsae.shards import FaultLog, expand, identity, read_shard
from tests.helpers import hub as fake
from tests.shards.conftest import pairs, picture, tar


@pytest.fixture
def hub(cache_folder, monkeypatch, tmp_path):
    rows = {"image": [{"bytes": picture((i, 0, 0))} for i in range(6)], "caption": [f"no {i}" for i in range(6)]}
    pq.write_table(pa.table(rows), tmp_path / "t.parquet")
    path = tar(tmp_path / "0.tar", pairs(4))
    files = {
        "README.md": b"a card",
        "data/train-0.parquet": (tmp_path / "t.parquet").read_bytes(),
        "tars/0.tar": open(path, "rb").read(),
    }
    with fake.serving() as server:
        fake.used_by(server, monkeypatch, tmp_path / "hub")
        server.repositories["datasets/o/n"] = fake.Repository(files)
        yield server
    huggingface_hub.HfFileSystem.clear_instance_cache()


def change(hub, name, content):
    """Another content for a file of the data set; None: it is gone."""
    repository = hub.repositories["datasets/o/n"]
    held = {**repository.files(), name: content}
    repository.commit("main", {n: f for n, f in held.items() if f is not None})


def read(pattern):
    return [s.caption for u in expand(pattern) for s in read_shard(u, FaultLog())]


def test_files_globs_and_whole_sets(hub):
    assert read("hf://datasets/o/n/tars/0.tar") == read("hf://datasets/o/n") == [f"picture {i}" for i in range(4)]
    assert read("hf://datasets/o/n/data/*.parquet") == read("hf://datasets/o/n/data") == [f"no {i}" for i in range(6)]
    change(hub, "tars/0.tar", None)
    assert read("hf://datasets/o/n") == [f"no {i}" for i in range(6)]  # tables, where there are no tars


def test_the_identity_is_that_of_the_content(hub):
    before = identity(expand("hf://datasets/o/n/tars/0.tar"))
    content = hub.repositories["datasets/o/n"].files()["tars/0.tar"]
    assert before[0][2] == f"hf://datasets/o/n/tars/0.tar {fake.oid(content)}"
    change(hub, "tars/0.tar", b"x" + content[1:])
    assert identity(expand("hf://datasets/o/n/tars/0.tar")) != before


def test_what_is_not_there(hub):
    with pytest.raises(InputError, match="does not exist"):
        expand("hf://datasets/o/n/tars/7.tar")
    with pytest.raises(InputError, match=r"hf://datasets/o/other.*does not exist|no credentials"):
        expand("hf://datasets/o/other")
    assert "hf" in fsspec.available_protocols()
