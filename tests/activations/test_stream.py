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


def loader(shards, seed=0, workers=0, rank=0, world=1, shuffle=10, **kw):
    host = Host()
    reader = Reader.of(host.transform(), host.tokenize, 6)
    options = {"shuffle": shuffle, "epoch_samples": 60, "workers": workers, "rank": rank, "world": world}
    pipe = make_pipeline(shards, reader, train=True, seed=seed, **options)
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


# What a resumed stream does, case by case; its rule is in docs/how-to/train.md


def some(stream, n):
    """The next n batches, over the ends of epochs."""
    out = []
    while len(out) < n:
        for b in stream:
            out.append(b.x["image"][:, 0].tolist())
            if len(out) == n:
                break
    return out


def resumed(shards, state, **kw):
    stream = loader(shards, **kw)
    stream.load_state_dict(state)
    return stream


def place(stream):
    return stream.epoch * len(stream) + stream.batch


def test_a_snapshot_before_the_first_batch_is_the_whole_run(shards):
    state = loader(shards).state_dict()
    assert some(resumed(shards, state), 12) == some(loader(shards), 12)


def test_a_snapshot_at_the_end_of_an_epoch_begins_the_next_one(shards):
    stream = loader(shards)
    epoch(stream)
    again = resumed(shards, stream.state_dict())
    assert len(epoch(again)) == 5 and again.epoch == 1


def test_the_second_checkpoint_is_further_than_the_first(shards):
    """Resumed twice, over several epochs: places add up, and no checkpoint leads back to an earlier order."""
    first = loader(shards)
    batches = [some(first, 7)]
    states = [first.state_dict()]
    for n in (4, 6):
        stream = resumed(shards, states[-1])
        assert place(stream) == 5 * states[-1]["epoch"] + states[-1]["batch"]
        batches.append(some(stream, n))
        states.append(stream.state_dict())
    drawn = [s["pipeline"]["drawn"] for s in states]
    assert [s["epoch"] * 5 + s["batch"] for s in states] == [7, 11, 17] and drawn == sorted(set(drawn))
    assert some(resumed(shards, states[1]), 3) == some(resumed(shards, states[1]), 3)
    fresh = [some(resumed(shards, s), 3) for s in states]
    assert all(a != b for i, a in enumerate(fresh) for b in fresh[:i])


@pytest.mark.parametrize(("before", "after"), [(0, 2), (2, 0), (2, 3)])
def test_another_number_of_workers_goes_on_at_the_same_place(shards, before, after):
    stream = loader(shards, workers=before)
    some(stream, 3)
    state = stream.state_dict()
    stream.close()
    again = resumed(shards, state, workers=after)
    rest = epoch(again)
    assert len(rest) == 2 and {len(b) for b in rest} == {8} and again.epoch == 0
    again.close()


def test_a_resumed_stream_begins_a_pass_of_its_own(shards):
    """What was read of the pass under way may be read again; the new one has all once, on any number of ranks."""
    stream = loader(shards)
    some(stream, 2)
    state, read = stream.state_dict(), []
    for world in (1, 3):
        pipes = [resumed(shards, state, rank=r, world=world, shuffle=1).pipeline for r in range(world)]
        read.append([k for p in pipes for _, b in zip(range(9 // world), p, strict=False) for k in b.keys])
    assert all(len(keys) == len(set(keys)) == 54 for keys in read)  # three shards of 20, read by batches of 6
