"""Batches that are read ahead: the same ones in the same order, errors in their place, and no thread left."""

import threading
import time

import pytest
import torch

from mmsae.activations import ActivationStore, StoreLoader, write_store
from mmsae.activations.prefetch import prefetched
from mmsae.types import InputError, Tokens


def batches(n, seen=None, fail=None):
    for i in range(n):
        if i == fail:
            raise InputError(f"batch {i} is bad")
        if seen is not None:
            seen.append(i)
        yield Tokens.pooled({"image": torch.full((2, 3), float(i))})


def threads():
    return [t for t in threading.enumerate() if t.name == "batches"]


def test_order_and_an_end():
    assert [int(b.x["image"][0, 0]) for b in prefetched(batches(7), "cpu")] == list(range(7))
    assert not threads()


def test_it_reads_ahead_and_not_far():
    seen = []
    ahead = prefetched(batches(20, seen), "cpu")
    next(ahead)
    end = time.monotonic() + 20
    while len(seen) < 3 and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(0.1)
    assert seen == [0, 1, 2]
    ahead.close()
    assert not threads() and len(seen) == 3


def test_an_error_comes_where_its_batch_would_have_been():
    ahead = prefetched(batches(7, fail=2), "cpu")
    assert [int(next(ahead).x["image"][0, 0]) for _ in range(2)] == [0, 1]
    with pytest.raises(InputError, match="batch 2 is bad"):
        next(ahead)
    assert not threads()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_on_a_device_batches_are_those_of_the_disk(tmp_path, dtype):
    store = ActivationStore(write_store(tmp_path / "s", {"image": torch.randn(5000, 64)}, dtype=dtype))
    want, got = StoreLoader(store, 100, window=4), StoreLoader(store, 100, window=4).put(torch.device("cuda", 0))
    for a, b in zip(want, got, strict=True):
        assert b.x["image"].is_cuda and b.x["image"].dtype == torch.float32
        assert torch.equal(a.x["image"], b.x["image"].cpu())
    assert want.state_dict() == got.state_dict() and not threads()
