"""Extraction from data that lies in other ways than in plain tars: the same rows, bit for bit."""

import pytest
import torch

from mmsae.activations import ActivationStore, extract
from mmsae.shards import ShardWriter
from tests.helpers.data_kinds import KINDS, laid_out
from tests.helpers.stores import FakeHost, contents, image_bytes

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
