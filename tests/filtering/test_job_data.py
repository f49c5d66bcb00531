"""Filtering data that lies in other ways than in plain tars: the same choice and the same members."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.helpers.data_kinds import KINDS, laid_out, members
from tests.helpers.filtering import QUIET, filter_shards, make_host, make_shards, tree


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("filter_data")
    make_host(root)
    make_shards(root / "shards")
    filter_shards(str(root / "clip-sae"), str(root / "shards"), str(root / "plain"), keep=0.4, **QUIET)
    return root


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
