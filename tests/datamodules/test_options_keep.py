"""Training on a list of uids sees the samples that training on the filtered shards sees, and can be resumed."""

import numpy as np
import pytest

from datamodules import CachedActivations, ImageTextDataModule, StreamingActivations
from mmsae.activations import extract
from mmsae.shards import FaultLog, ShardWriter, read_shard
from mmsae.shards.uids import DATACOMP
from mmsae.types import InputError
from tests.helpers.stores import FakeHost, make_shards

QUIET = {"workers": 0, "progress": False, "batch_size": 4}
LISTED = [i for i in range(60) if i % 5 in (0, 2)]


@pytest.fixture
def data(tmp_path):
    """Shards, the list of some of their uids, and shards of those samples."""
    shards = make_shards(tmp_path / "all", 3, 20, uid=lambda i: f"{i:032x}")
    np.save(tmp_path / "uids.npy", np.array([(0, i) for i in LISTED], DATACOMP))
    with ShardWriter(tmp_path / "kept", per_shard=10) as w:
        for path in shards:
            for s in read_shard(path, FaultLog(), decode=False):
                if int(s.uid, 16) in LISTED:
                    w.write(s.key, {k: s.raw[k] for k in ("png", "txt", "json")})
    return str(tmp_path / "all"), str(tmp_path / "kept"), str(tmp_path / "uids.npy")


def seen(loader):
    return sorted(u for batch in loader for u in batch.uids)


def test_a_store_and_a_list_are_the_smaller_store(data, tmp_path):
    all_, kept, keep = data
    options = {"batch_size": 3, "val_fraction": 0.25, "uids": True}
    listed = CachedActivations(str(extract(FakeHost(), all_, tmp_path / "a", **QUIET)), keep=keep, **options)
    smaller = CachedActivations(str(extract(FakeHost(), kept, tmp_path / "b", **QUIET)), **options)
    for name in ("train", "val", "test", "predict"):
        one, two = (getattr(d, f"{name}_dataloader")() for d in (listed, smaller))
        assert one.n_rows == two.n_rows and len(one) == len(two)
        assert seen(one) == seen(two) and len(seen(one)) == {"train": 18, "predict": 24}.get(name, 6)
    assert sorted(int(u, 16) for u in seen(listed.predict_dataloader())) == LISTED


def test_resuming_needs_the_same_list(data, tmp_path):
    all_, _, keep = data
    store = str(extract(FakeHost(), all_, tmp_path / "a", **QUIET))
    loader = CachedActivations(store, batch_size=3, keep=keep, uids=True).train_dataloader()
    batches = iter(loader)
    next(batches)
    state = loader.state_dict()
    rest = [b.uids for b in batches]
    again = CachedActivations(store, batch_size=3, keep=keep, uids=True).train_dataloader()
    again.load_state_dict(state)
    assert [b.uids for b in again] == rest
    np.save(tmp_path / "same_size.npy", np.array([(0, i + 1) for i in LISTED], DATACOMP))
    for other in (str(tmp_path / "same_size.npy"), None):
        loader = CachedActivations(store, batch_size=3, keep=other).train_dataloader()
        with pytest.raises(InputError, match="was made with"):
            loader.load_state_dict(state)
    state["order"].pop("keep")  # of a version without lists
    loader.load_state_dict({"epoch": 0, "batch": 1, "order": loader._order_key() | {"keep": None}})
    with pytest.raises(InputError, match="was made with keep None"):
        again.load_state_dict(state)


def test_a_stream_is_of_the_listed_samples(data):
    all_, kept, keep = data
    host = FakeHost()
    options = {"transform": host.transform(), "tokenize": host.tokenize, "batch_size": 4, "workers": 0, "shuffle": 5}
    listed = ImageTextDataModule(train=all_, val=all_, keep=keep, **options)
    smaller = ImageTextDataModule(train=kept, val=kept, **options)
    one, two = (d.val_dataloader() for d in (listed, smaller))
    assert seen(one) == seen(two) and [int(u, 16) for u in seen(one)] == LISTED
    train, other = listed.train_dataloader(), smaller.train_dataloader()
    assert len(train) == len(other) == 6
    for loader in (train, other):  # an endless stream: three passes over the shards, as many samples in an epoch
        assert {int(u, 16) for _ in range(3) for u in seen(loader)} == set(LISTED)
    state = train.state_dict()
    train.load_state_dict(state)
    with pytest.raises(InputError, match=r"was made with keep .*this run has None"):
        smaller.train_dataloader().load_state_dict(state)


def test_host_and_stream_take_the_list(data):
    all_, _, keep = data
    made = StreamingActivations(all_, "local-dir:none", d_in=6, keep=keep)
    assert len(made.reading.uids) == len(LISTED) and made.reading.epoch(all_) == len(LISTED)


def test_nothing_listed_is_said(data, tmp_path):
    all_, _, _ = data
    np.save(tmp_path / "none.npy", np.array([(9, 9)], DATACOMP))
    host = FakeHost()
    data = ImageTextDataModule(
        all_, transform=host.transform(), tokenize=host.tokenize, batch_size=4, workers=0, epoch_samples=8,
        keep=str(tmp_path / "none.npy"),
    )  # fmt: skip
    with pytest.raises(InputError, match=r"No usable sample in 3 shards in a row.*60 are not in keep"):
        next(iter(data.train_dataloader()))
