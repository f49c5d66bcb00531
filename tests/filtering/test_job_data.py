"""Filtering data that lies in other ways than in plain tars: the same choice and the same members."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from mmsae.remote import http
from tests.helpers.data_kinds import KINDS, laid_out, members
from tests.helpers.filtering import QUIET, filter_shards, make_host, make_shards, tree
from tests.helpers.web import serving


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("filter_data")
    make_host(root)
    make_shards(root / "shards")
    filter_shards(str(root / "clip-sae"), str(root / "shards"), str(root / "plain"), keep=0.4, **QUIET)
    return root


def test_the_same_bytes_from_a_server(root, tmp_path, monkeypatch):
    monkeypatch.setenv("MMSAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv(http.ALLOWED, "127.0.0.1")
    tars = sorted((root / "shards").glob("*.tar"))
    with serving() as server:
        server.files |= {f"/{p.name}": p.read_bytes() for p in tars}
        shards = [f"{server.url}/{p.name}" for p in tars]
        filter_shards(str(root / "clip-sae"), shards, str(tmp_path / "out"), keep=0.4, **QUIET)
    found, plain = tree(tmp_path / "out"), tree(root / "plain")
    told = {"results.json", "pair_weights.json"}  # which say where the data is from
    assert {n: b for n, b in found.items() if n not in told} == {n: b for n, b in plain.items() if n not in told}


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_choice_whatever_the_data_lies_in(kind, root, tmp_path):
    pattern = laid_out(kind, sorted((root / "shards").glob("*.tar")), tmp_path / "data")
    out = tmp_path / "out"
    filter_shards(str(root / "clip-sae"), pattern, str(out), keep=0.4, **QUIET)
    assert (out / "uids.npy").read_bytes() == (root / "plain/uids.npy").read_bytes()
    found, plain = (pq.read_table(p / "scores.parquet").drop_columns(["shard"]) for p in (out, root / "plain"))
    assert found.equals(plain)
    if kind.startswith("tar"):
        shards = {n: b for n, b in tree(out).items() if n.startswith("shards/")}
        assert shards == {n: b for n, b in tree(root / "plain").items() if n.startswith("shards/")}
    else:
        found, plain = (members(sorted(Path(p, "shards").glob("*.tar"))) for p in (out, root / "plain"))
        same = {n for n in plain if n.endswith((".png", ".txt") + (".json",) * (kind == "images"))}
        assert {n: found[n] for n in same} == {n: plain[n] for n in same} and len(same) >= 64
