"""Data sets of the hub, against a small hub on this machine."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import fsspec
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants

from mmsae.errors import InputError
from mmsae.shards import FaultLog, expand, identity, read_shard
from tests.shards.conftest import pairs, picture, tar


class Hub(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, code, body, **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        path, _, query = self.path.partition("?")
        files = self.server.files
        if path in ("/api/datasets/o/n", "/api/datasets/o/n/revision/main"):
            self.answer(200, {"id": "o/n", "sha": "a" * 40, "siblings": []})
        elif "/o/n/tree/main" in path:
            below = path.partition("/tree/main")[2].strip("/")
            start = below + "/" if below else ""
            rows = []
            for name in sorted(f for f in files if f.startswith(start)):
                rest = name[len(start) :]
                if "/" in rest and "recursive=true" not in query:
                    row = {"type": "directory", "oid": "c" * 40, "size": 0, "path": start + rest.split("/")[0]}
                else:
                    row = {"type": "file", "oid": self.server.tags[name], "size": len(files[name]), "path": name}
                rows += [row] if row not in rows else []
            self.answer(200, rows)
        elif (name := path.partition("/datasets/o/n/resolve/main/")[2]) in files:
            data, part = files[name], self.headers.get("Range")
            about = {"ETag": f'"{self.server.tags[name]}"', "X_Repo_Commit": "a" * 40}
            if part:
                first, last = (int(n) if n else len(data) - 1 for n in part.removeprefix("bytes=").split("-"))
                last = min(last, len(data) - 1)
                about["Content_Range"] = f"bytes {first}-{last}/{len(data)}"
                self.answer(206, data[first : last + 1], **about)
            else:
                self.answer(200, data, **about)
        else:
            self.answer(404, {"error": "not found"}, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET


@pytest.fixture
def hub(cache_folder, monkeypatch, tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}" + template.split("/{repo_id}")[1])
    huggingface_hub.HfFileSystem.clear_instance_cache()
    rows = {"image": [{"bytes": picture((i, 0, 0))} for i in range(6)], "caption": [f"no {i}" for i in range(6)]}
    pq.write_table(pa.table(rows), tmp_path / "t.parquet")
    path = tar(tmp_path / "0.tar", pairs(4))
    server.files = {
        "README.md": b"a card",
        "data/train-0.parquet": (tmp_path / "t.parquet").read_bytes(),
        "tars/0.tar": open(path, "rb").read(),
    }
    server.tags = {name: f"{i}" * 40 for i, name in enumerate(server.files)}
    yield server
    server.shutdown()
    server.server_close()
    huggingface_hub.HfFileSystem.clear_instance_cache()


def read(pattern):
    return [s.caption for u in expand(pattern) for s in read_shard(u, FaultLog())]


def test_files_globs_and_whole_sets(hub):
    assert read("hf://datasets/o/n/tars/0.tar") == read("hf://datasets/o/n") == [f"picture {i}" for i in range(4)]
    assert read("hf://datasets/o/n/data/*.parquet") == read("hf://datasets/o/n/data") == [f"no {i}" for i in range(6)]
    del hub.files["tars/0.tar"]
    assert read("hf://datasets/o/n") == [f"no {i}" for i in range(6)]  # tables, where there are no tars


def test_the_identity_is_that_of_the_content(hub):
    before = identity(expand("hf://datasets/o/n/tars/0.tar"))
    assert before[0][2] == f"hf://datasets/o/n/tars/0.tar {'2' * 40}"
    hub.tags["tars/0.tar"] = "9" * 40
    assert identity(expand("hf://datasets/o/n/tars/0.tar")) != before


def test_what_is_not_there(hub):
    with pytest.raises(InputError, match="does not exist"):
        expand("hf://datasets/o/n/tars/7.tar")
    with pytest.raises(InputError, match=r"hf://datasets/o/other.*does not exist|no credentials"):
        expand("hf://datasets/o/other")
    assert "hf" in fsspec.available_protocols()
