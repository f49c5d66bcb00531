"""The batch size of a store that nobody gave: the host's, recorded, and kept by what goes on with it."""

import json

import pytest

from mmsae.activations import ActivationStore, extract
from mmsae.types import InputError
from tests.helpers.stores import FakeHost, contents, make_shards

QUIET = {"workers": 0, "progress": False}


def test_the_batch_size_that_nobody_gave_is_recorded_and_kept(tmp_path):
    shards = make_shards(tmp_path / "shards")

    class Chooses(FakeHost):
        chosen = 5

        def batch_size(self, asked=None):
            return self.chosen if asked is None else asked

    host = Chooses()
    given = extract(host, shards, tmp_path / "given", batch_size=5, **QUIET)
    store = extract(host, shards, tmp_path / "s", **QUIET)
    assert ActivationStore(store).spec.job["batch_size"] == 5 and contents(store) == contents(given)
    host.chosen = 7  # another machine would choose another number
    assert contents(extract(host, shards, tmp_path / "s", **QUIET)) == contents(given)
    begun = tmp_path / "begun"
    begun.mkdir()
    spec = json.loads((store / "spec.json").read_text())
    job = {"sites": {}, "dtype": spec["dtype"], "units": len(shards), "job": spec["job"]}
    (begun / "job.json").write_text(json.dumps(job))
    with pytest.raises(InputError, match="its sites"):  # and not: its batch_size
        extract(host, shards, begun, **QUIET)
    assert ActivationStore(extract(host, shards, tmp_path / "t", **QUIET)).spec.job["batch_size"] == 7
