"""Streaming: epochs of equally many batches from shards through a host, faults on board, restarts in another order."""

import pytest
import torch

from mmsae.activations import CaptureLoader, StreamingLoader
from mmsae.shards import Reader, make_pipeline
from mmsae.types import Tokens
from tests.helpers.stores import FakeHost, make_shards


class Host(FakeHost):
    def capture(self, batch, sites=None):
        chosen = sites or self.default_sites()
        rows = self.read(batch, list(chosen.values()))
        return Tokens(
            {m: r.x for m, r in zip(chosen, rows, strict=True)}, {m: r.item for m, r in zip(chosen, rows, strict=True)}
        )


@pytest.fixture
def shards(tmp_path):
    return make_shards(tmp_path / "shards", 3, 20)


def loader(shards, seed=0, **kw):
    host = Host()
    reader = Reader.of(host.transform(), host.tokenize, 6)
    pipe = make_pipeline(shards, reader, train=True, seed=seed, shuffle=10, epoch_samples=60)
    return StreamingLoader(host, pipe, 5, 8, 24, seed=seed, **kw)


def epoch(stream):
    return [b.x["image"][:, 0].tolist() for b in stream]


def test_epochs_of_equally_many_full_batches(shards):
    stream = loader(shards)
    epochs = [epoch(stream) for _ in range(3)]
    assert len(stream) == 5 and all(len(e) == 5 and {len(b) for b in e} == {8} for e in epochs)
    assert epochs[0] != epochs[1]
    assert len({v for e in epochs for b in e for v in b}) > 40  # 120 draws reach most of the 60 samples


def test_a_seed_is_an_order(shards):
    assert epoch(loader(shards, 1)) == epoch(loader(shards, 1)) != epoch(loader(shards, 2))


def test_faults_travel_with_the_batches(shards):
    stream = loader(shards)
    seen = sum(b.faults.seen for b in stream)
    assert seen >= 5 * 8 + 24 - 8  # what was read to fill the buffer and to give five batches


def test_a_restart_keeps_the_place_and_takes_another_order(shards):
    whole = loader(shards)
    batches = epoch(whole)
    stopped = loader(shards)
    it = iter(stopped)
    for _ in range(2):
        next(it)
    state = stopped.state_dict()
    again = loader(shards)
    again.load_state_dict(state)
    rest = epoch(again)
    assert len(rest) == 3 and rest != batches[2:]
    assert again.epoch == 0 and len(epoch(again)) == 5 and again.epoch == 1
    twice = loader(shards)
    twice.load_state_dict(state)
    assert epoch(twice) == rest


def test_validation_is_every_sample_once(shards):
    host = Host()
    pipe = make_pipeline(shards, Reader.of(host.transform(), host.tokenize, 7), train=False)
    captured = CaptureLoader(host, pipe)
    for _ in range(2):
        batches = list(captured)
        assert sum(len(b.x["text"]) for b in batches) == 60 == sum(b.faults.seen for b in batches)
        assert torch.cat([b.x["image"] for b in batches])[:, 0].unique().numel() == 60
