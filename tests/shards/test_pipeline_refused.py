"""What a host's transform, tokenizer or collate raises about one sample is a fault of that sample."""

import pytest
import torch

from mmsae.shards import FaultLog, Reader, make_pipeline, taken, tried, unit_batches
from mmsae.types import ImageTextBatch, InputError


def refusing(code, *words):
    """The code, but for inputs that have one of some words."""

    def run(x):
        for w in words:
            if w in (x if isinstance(x, str) else str(x)):
                raise ValueError(f"cannot take {w}\nsecond line")
        return code(x)

    return run


class Collate:
    """A host's collate; counts its calls."""

    need = ("image", "caption")

    def __init__(self, bad=(), error=ValueError, alone=False):
        self.bad, self.error, self.alone, self.calls = bad, error, alone, 0

    def __call__(self, samples):
        self.calls += 1
        if any(s.key in self.bad for s in samples) and not (self.alone and len(samples) == 1):
            raise self.error("no such picture\nmore")
        columns = ([getattr(s, f) for s in samples] for f in ("uid", "caption", "key", "shard"))
        uids, captions, keys, shards = columns
        return ImageTextBatch(torch.zeros(len(samples), 1), None, uids, captions, keys, shards)


def keys(batches):
    return [k for b in batches for k in b.keys]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_collate_that_refuses_some_samples(tmp_path, make, workers):
    make.tar(tmp_path / "a.tar", make.pairs(9))
    make.tar(tmp_path / "b.tar", make.pairs(3, start=20))
    collate = Collate(bad=("00000", "00004", "00022"))
    loader = make_pipeline(
        str(tmp_path), Reader.of(None, None, 3, collate=collate), train=False, fault_limit=0.5, workers=workers
    )
    batches = list(loader)
    assert [b.keys for b in batches] == [["00001", "00002", "00003"], ["00005", "00006", "00007"], ["00008"],
                                         ["00020", "00021"]]  # fmt: skip
    assert loader.faults.counts == {"refused_by_host": 3} and loader.faults.n_seen == 12
    assert ("refused_by_host", "a.tar", "00004", "ValueError: no such picture") in loader.faults.take().examples


def test_a_transform_and_a_tokenizer_that_refuse_some_samples(tmp_path, make):
    path = make.tar(tmp_path / "a.tar", make.pairs(8))
    few = refusing(make.tokenize, "picture 2", "picture 5")
    batches = [u.batch for u in unit_batches([path], make.transform, few, 3)]
    assert keys(batches) == ["00000", "00001", "00003", "00004", "00006", "00007"]
    assert [len(b.images) for b in batches if b.uids] == [3, 3] and len(batches[0].texts) == 3

    def transform(image):
        if image.getpixel((0, 0))[0] == 6:
            raise InputError("absolute aspect ratio must be smaller than 200")
        return make.transform(image)

    log = FaultLog()
    for unit in unit_batches([path], transform, make.tokenize, 3):
        log.merge(unit.batch.faults)
    examples = log.take().examples
    assert ("refused_by_host", "a.tar", "00006", "absolute aspect ratio must be smaller than 200") in examples


def test_training_batches_stay_full(tmp_path, make):
    make.tar(tmp_path / "a.tar", make.pairs(9))
    few = refusing(make.tokenize, "picture 2", "picture 5")
    loader = make_pipeline(
        str(tmp_path), Reader.of(make.transform, few, 4), train=True, epoch_samples=40, fault_limit=0.5, shuffle=4
    )
    batches = list(loader)
    assert [len(b.uids) for b in batches] == [4] * 10 and not {"00002", "00005"} & set(keys(batches))
    assert loader.faults.counts["refused_by_host"] >= 8


@pytest.mark.parametrize("train", [False, True])
def test_what_every_sample_meets_ends_the_job_with_the_reason(tmp_path, make, train):
    make.tar(tmp_path / "a.tar", make.pairs(30))
    collate = Collate(bad=[f"{i:05d}" for i in range(30)], error=TypeError)
    loader = make_pipeline(str(tmp_path), Reader.of(None, None, 4, collate=collate), train=train, epoch_samples=8)
    with pytest.raises(InputError, match=r"refused_by_host \d+.*TypeError: no such picture") as e:
        next(iter(loader))
    assert "\n" not in str(e.value)
    assert collate.calls < 6000


def test_a_long_tar_of_refused_samples_is_judged_before_its_end(tmp_path, make):
    make.tar(tmp_path / "a.tar", [(f"{i:05d}", {"png": make.picture(), "txt": "t"}) for i in range(1500)])
    collate = Collate(bad=[f"{i:05d}" for i in range(1500)])
    loader = make_pipeline(str(tmp_path), Reader.of(None, None, 50, collate=collate), train=False)
    with pytest.raises(
        InputError, match=r"1000 of 1000 samples .* refused_by_host 1000; the first was .* a\.tar 00000"
    ):
        list(loader)


def test_samples_that_are_refused_only_together_are_nobodys_fault(tmp_path, make):
    path = make.tar(tmp_path / "a.tar", make.pairs(4))
    with pytest.raises(ValueError, match="no such picture"):
        list(unit_batches([path], None, None, 4, collate=Collate(bad=("00001",), alone=True)))
    with pytest.raises(MemoryError):
        list(unit_batches([path], None, None, 4, collate=Collate(bad=("00001",), error=MemoryError)))


def test_tried_and_taken():
    log, place = FaultLog(), lambda row: ("s", str(row))

    def make(rows):
        return [1 / r for r in rows]

    assert tried(make, [1, 2], log, place) == ([1.0, 0.5], [1, 2]) and not log.counts
    assert tried(make, [1, 0, 2], log, place) == (None, [1, 2])
    assert taken(make, [0, 2], log, place) == ([0.5], [2]) and taken(make, [0], log, place) == (None, [])
    assert taken(make, [], log, place) == (None, []) and log.counts == {"refused_by_host": 3}
    assert log.take().examples[0] == ("refused_by_host", "s", "0", "ZeroDivisionError: division by zero")
