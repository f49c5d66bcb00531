"""Extraction of the samples of a list."""

import numpy as np
import pytest
import torch

from mmsae.activations import ActivationStore, extract
from mmsae.shards.uids import DATACOMP
from mmsae.types import InputError
from tests.helpers.stores import FakeHost, contents, make_shards

QUIET = {"workers": 0, "progress": False, "batch_size": 4}


@pytest.fixture
def data(tmp_path):
    shards = make_shards(tmp_path / "shards", uid=lambda i: f"{i * i:032x}")
    listed = [i for i in range(30) if i % 3 == 1 and not 10 <= i < 20]  # none of the second shard
    pairs = np.array([(0, i * i) for i in listed] + [(7, 7)], DATACOMP)
    np.save(tmp_path / "uids.npy", pairs)
    return shards, str(tmp_path / "uids.npy"), listed


def test_the_store_is_of_the_listed_samples(data, tmp_path, capsys):
    shards, keep, listed = data
    all_ = ActivationStore(extract(FakeHost(), shards, tmp_path / "all", **QUIET))
    some = ActivationStore(extract(FakeHost(), shards, tmp_path / "some", keep=keep, **QUIET | {"progress": True}))
    assert "6 of the 7 uids of" in (said := capsys.readouterr().out) and "1 were not seen" in said
    assert [int(u, 16) for u in some.uids] == [i * i for i in listed]
    for m in ("image", "text"):
        torch.testing.assert_close(some.load(m), all_.load(m, uids=some.uids))
    faults = some.spec.faults
    assert faults["seen"] == len(listed) and faults["counts"] == {"not_in_keep": 30 - len(listed)}
    assert len(some.spec.job["keep"]) == 32 and "keep" not in all_.spec.job


def test_the_list_is_part_of_the_job(data, tmp_path):
    shards, keep, _ = data
    out = extract(FakeHost(), shards, tmp_path / "out", keep=keep, **QUIET)
    assert contents(extract(FakeHost(), shards, tmp_path / "w", keep=keep, **QUIET | {"workers": 2})) == contents(out)
    np.save(tmp_path / "other.npy", np.load(keep)[1:])
    for other in (str(tmp_path / "other.npy"), None):
        with pytest.raises(InputError, match="of another job: its keep is"):
            extract(FakeHost(), shards, out, keep=other, **QUIET)
