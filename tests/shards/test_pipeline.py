import logging
import multiprocessing.util
import os
import random
import signal
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from mmsae.jobs import units
from mmsae.shards import FaultLog, Reader, ShardWriter, Source, expand, make_pipeline, make_uid, unit_batches
from mmsae.shards.batches import IF_ANY
from mmsae.shards.streams import shard_order
from mmsae.types import ImageTextBatch, InputError
from tests.helpers.evaluation import png


@pytest.fixture
def folder(tmp_path, make):
    """Five shards of 1 to 9 good samples, 25 together."""
    for i, n in enumerate((7, 1, 9, 3, 5)):
        make.tar(tmp_path / f"s{i}.tar", make.pairs(n, start=100 * i))
    return tmp_path


def pipeline(sources, make, batch_size=4, train=False, **kw):
    return make_pipeline(sources, Reader.of(make.transform, make.tokenize, batch_size), train=train, **kw)


def total(batches):
    log = FaultLog()
    for batch in batches:
        log.merge(batch.faults)
    return log


# The exact pass


@pytest.mark.parametrize("workers", [0, 2, 9])
def test_every_sample_once_whatever_the_workers(folder, make, workers):
    batches = list(pipeline(str(folder), make, workers=workers))
    assert all(isinstance(b, ImageTextBatch) for b in batches)
    assert sorted(k for b in batches for k in b.keys) == [
        f"{100 * i + j:05d}" for i, n in enumerate((7, 1, 9, 3, 5)) for j in range(n)
    ]
    assert len({u for b in batches for u in b.uids}) == 25
    alone = {b.keys[0]: b for b in pipeline(str(folder), make)}  # batches do not depend on workers
    for b in batches:
        assert b.keys == alone[b.keys[0]].keys and torch.equal(b.images, alone[b.keys[0]].images)
        assert len(set(b.shards)) == 1 and b.images.shape == (len(b.uids), 3, 2, 2)
        assert torch.equal(b.texts, make.tokenize(b.captions))
        assert b.images[:, 0, 0, 0].tolist() == [int(k) % 256 for k in b.keys]
    assert total(batches).to_dict()["seen"] == 25


def test_ranks_share_the_tars_and_one_without_any_yields_nothing(folder, make):
    per_rank = [[k for b in pipeline(str(folder), make, rank=r, world=7) for k in b.keys] for r in range(7)]
    assert [len(keys) for keys in per_rank] == [7, 1, 9, 3, 5, 0, 0]
    two = [[b.keys for b in pipeline(str(folder), make, rank=r, world=2)] for r in range(2)]
    one = [b.keys for b in pipeline(str(folder), make)]
    assert sorted(two[0] + two[1]) == sorted(one)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_faults_of_the_batches_add_up_even_after_the_last_batch(tmp_path, make, workers):
    bad = [("zero", {"png": b"", "txt": "t"}), ("mute", {"png": make.picture()})]
    make.tar(tmp_path / "a.tar", [*bad, *make.pairs(4), *bad])
    make.tar(tmp_path / "b.tar", bad)  # nothing but faults
    make.tar(tmp_path / "c.tar", [*make.pairs(2, start=50), *bad])
    cut = Path(make.tar(tmp_path / "d.tar", make.pairs(3, start=70)))
    cut.write_bytes(cut.read_bytes()[:3000])
    (tmp_path / "e.tar").write_bytes(b"")
    loader = pipeline(str(tmp_path), make, batch_size=2, fault_limit=1.0, workers=workers)
    batches = list(loader)
    assert all(b.uids for b in batches) and sum(len(b.uids) for b in batches) == 7
    expected = {"broken_image": 4, "missing_caption": 4, "truncated_shard": 2}
    assert total(batches).counts == loader.faults.counts == expected
    assert total(batches).n_seen == loader.faults.n_seen == 17
    assert {e[1] for e in loader.faults.take().examples} == {"a.tar", "b.tar", "c.tar", "d.tar", "e.tar"}
    assert total(list(loader)).counts == expected  # a second pass counts anew


def test_a_pass_without_a_good_sample_still_counts(tmp_path, make):
    make.tar(tmp_path / "a.tar", [("zero", {"png": b"", "txt": "t"})])
    loader = pipeline(str(tmp_path), make, fault_limit=1.0)
    assert list(loader) == [] and loader.faults.counts == {"broken_image": 1}
    with pytest.raises(InputError, match=r"1 of 1 samples \(100\.0%\)"):
        list(pipeline(str(tmp_path), make))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_limit_is_judged_at_the_end_in_one_sentence(tmp_path, make, workers):
    for i in range(2):
        bad = [(f"zero{j}", {"png": b"", "txt": "t"}) for j in range(2)]
        make.tar(tmp_path / f"{i}.tar", make.pairs(8, start=10 * i) + bad)
    assert sum(len(b.uids) for b in pipeline(str(tmp_path), make, fault_limit=0.2, workers=workers)) == 16
    loader, seen = pipeline(str(tmp_path), make, fault_limit=0.19, workers=workers), []
    with pytest.raises(InputError, match=r"4 of 20 samples .* limit of 19\.0%") as e:
        seen.extend(loader)
    assert "\n" not in str(e.value) and len(seen) == 3  # the last batch is not handed out


def test_duplicate_uids_are_refused_by_name(tmp_path, make):
    for name in ("a", "b"):
        make.tar(tmp_path / f"{name}.tar", [("k", {"png": make.picture(), "txt": "t", "json": {"uid": "ab" * 16}})])
    with pytest.raises(InputError, match=rf"uid {'ab' * 16} of key k in shard b\.tar .* shard a\.tar"):
        list(pipeline(str(tmp_path), make))


def test_shards_of_one_name_give_uids_that_differ_whatever_makes_them_sources(tmp_path, make):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        make.tar(tmp_path / name / "0.tar", make.pairs(2))
    patterns = [f"{tmp_path}/a", f"{tmp_path}/b"]
    want = [make_uid("", f"{n}/0.tar", k, {}) for n in "ab" for k in ("00000", "00001")]
    for sources in (patterns, dict.fromkeys(patterns, 1.0), [Source(p) for p in patterns]):
        assert [u for b in pipeline(sources, make) for u in b.uids] == want
    named = [Source(p, name=p[-1]) for p in patterns]  # told apart by the source already
    assert next(iter(pipeline(named, make))).uids == [make_uid("a", "0.tar", k, {}) for k in ("00000", "00001")]


def test_the_work_of_units_knows_the_names_of_the_whole_set(tmp_path, make):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        make.tar(tmp_path / name / "0.tar", make.pairs(2))
    paths = expand(f"{tmp_path}/*/0.tar")
    whole = [u for x in unit_batches(paths, make.transform, make.tokenize, 9) for u in x.batch.uids]
    rest = [u for x in unit_batches(paths[1:], make.transform, make.tokenize, 9, workers=1) for u in x.batch.uids]
    assert len(set(whole)) == 4 and rest == whole[2:]
    assert [u.name for u in units(paths)] != [u.name for u in units(paths[::-1])][::-1]


def test_batches_of_units_refuse_a_uid_for_the_second_time(tmp_path, make):
    for name in ("a", "b"):
        make.tar(tmp_path / f"{name}.tar", [("k", {"png": make.picture(), "txt": "t", "json": {"uid": "ab" * 16}})])
    with pytest.raises(InputError, match=r"shard b\.tar .* shard a\.tar"):
        list(unit_batches(expand(str(tmp_path)), make.transform, make.tokenize, 4))
    assert len(list(unit_batches(expand(str(tmp_path)), make.transform, make.tokenize, 4, unique=False))) == 2


def test_images_alone_and_texts_alone(tmp_path, make):
    path = make.tar(tmp_path / "x.tar", [("a", {"txt": "t"}), ("b", {"png": make.picture()}), *make.pairs(1)])
    images = make_pipeline(path, Reader.of(make.transform, None, 4), train=False, fault_limit=1)
    texts = make_pipeline(path, Reader.of(None, make.tokenize, 4), train=False, fault_limit=1)
    (i,), (t,) = list(images), list(texts)
    assert i.texts is None and i.images.shape[0] == 2 and i.keys == ["b", "00000"]
    assert t.images is None and t.texts.shape[0] == 2 and t.keys == ["a", "00000"]


def test_long_captions_are_noted_and_kept(tmp_path, make):
    texts = ["a", "two words", "three words here", "many words in a row"]
    path = make.tar(tmp_path / "x.tar", [(f"k{i}", {"png": make.picture(), "txt": t}) for i, t in enumerate(texts)])
    loader = pipeline(path, make, fault_limit=0)
    (batch,) = list(loader)
    assert batch.captions == texts and batch.faults.counts == {"long_caption": 2} and loader.faults.dropped == 0
    assert [e[2] for e in batch.faults.examples] == ["k2", "k3"]


def test_units_end_with_a_marked_batch(tmp_path, make):
    paths = [make.tar(tmp_path / f"{i}.tar", make.pairs(n, start=10 * i)) for i, n in enumerate((5, 2, 4))]
    paths.append(make.tar(tmp_path / "bad.tar", [("zero", {"png": b"", "txt": "t"})]))
    for workers in (0, 2):
        found = {path: [] for path in paths}
        for packet in unit_batches(paths, make.transform, make.tokenize, 2, workers=workers):
            found[packet.path].append(packet)
        assert [[len(p.batch.uids) for p in found[path]] for path in paths] == [[2, 2, 1], [2], [2, 2], [0]]
        assert all([p.last for p in ps] == [False] * (len(ps) - 1) + [True] for ps in found.values())
        assert found[paths[3]][0].batch.faults.counts == {"broken_image": 1}


# Training


def test_shard_order_reads_every_shard_equally_often_and_none_twice_at_a_time():
    paths = [f"s{i}" for i in range(7)]
    lanes = [list(islice(shard_order(paths, "0", lane, 3), 14)) for lane in range(3)]
    assert Counter(p for lane in lanes for p in lane) == dict.fromkeys(paths, 6)
    dealt = [p for row in zip(*lanes, strict=True) for p in row]
    passes = [dealt[i : i + 7] for i in range(0, 42, 7)]
    assert all(sorted(p) == paths for p in passes) and len({tuple(p) for p in passes}) > 1
    assert list(islice(shard_order(["only"], "0", 5, 8), 3)) == ["only"] * 3


def test_epochs_are_full_equal_and_go_on_where_the_last_ended(folder, make):
    loaders = [
        pipeline(str(folder), make, train=True, epoch_samples=26, rank=r, world=2, shuffle=1, workers=w)
        for r, w in ((0, 0), (1, 2))
    ]
    for loader in loaders:
        assert len(loader) == 3
        epochs = [[k for b in loader for k in b.keys] for _ in range(8)]
        assert [len(e) for e in epochs] == [12] * 8
        assert len({k for e in epochs for k in e}) == 25  # an epoch is shorter than the longest shards' ends
        assert loader.drawn == 24
        loader.close()


def test_order_follows_from_the_seed_alone(folder, make):
    def keys(seed, drawn=0, workers=0):
        loader = pipeline(str(folder), make, train=True, epoch_samples=40, seed=seed, shuffle=10, workers=workers)
        loader.load_state_dict({"drawn": drawn})
        return [b.keys for b in loader]

    torch.manual_seed(1)
    random.seed(1)
    first = keys(3, workers=2)
    state = torch.get_rng_state(), random.getstate()
    assert keys(3, workers=2) == first
    assert torch.equal(torch.get_rng_state(), state[0]) and random.getstate() == state[1]
    assert keys(3) == keys(3) != keys(4)
    assert keys(3, drawn=10) != keys(3)  # a resumed run does not begin with the same samples again


def test_random_transforms_follow_the_seed_in_workers(folder, make):
    def noise(image):
        return torch.rand(3, 2, 2)

    drawn = [
        torch.cat([b.images for b in make_pipeline(
            str(folder), Reader.of(noise, make.tokenize, 4), train=True, epoch_samples=40, seed=s, workers=2)])
        for s in (5, 5, 6)
    ]  # fmt: skip
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert len(drawn[0].unique()) > 400  # the workers do not repeat each other


def test_sources_are_mixed_by_weight_not_by_size(tmp_path, make):
    make.tar(tmp_path / "big.tar", make.pairs(90))
    make.tar(tmp_path / "small.tar", make.pairs(5))
    sources = {str(tmp_path / "big.tar"): 1.0, str(tmp_path / "small.tar"): 3.0}
    loader = pipeline(sources, make, train=True, epoch_samples=2000, batch_size=50, shuffle=20)
    share = Counter(s for b in loader for s in b.shards)["small.tar"] / 2000
    assert abs(share - 0.75) < 0.05  # 5 standard deviations


def test_workers_are_capped_and_said_and_too_few_shards_refused(folder, make, caplog):
    with caplog.at_level(logging.WARNING, "mmsae.shards"):
        loader = pipeline(str(folder), make, train=True, epoch_samples=8, workers=6, world=2)
        assert loader.workers == 2 and "6 workers asked for, 2 used" in caplog.text
    with pytest.raises(InputError, match="Training on 6 ranks needs at least 6 shards, and there are 5"):
        pipeline(str(folder), make, train=True, epoch_samples=80, world=6)
    with pytest.raises(InputError, match="epoch of 7 samples is less than one batch of 4 on each of 2 ranks"):
        pipeline(str(folder), make, train=True, epoch_samples=7, world=2)
    with pytest.raises(InputError, match="epoch of None samples"):
        pipeline(str(folder), make, train=True)


@pytest.mark.parametrize("workers", [0, 1])
def test_training_on_shards_without_a_good_sample_ends(tmp_path, make, monkeypatch, workers):
    monkeypatch.setattr("mmsae.shards.streams.GIVE_UP", 50)
    mute = make.tar(tmp_path / "mute.tar", [(f"{i}", {"png": make.picture()}) for i in range(3)])
    junk = make.tar(tmp_path / "junk.tar", [(f"{i}", {"png": b"junk", "txt": "t"}) for i in range(3)])
    for path, sentence in ((mute, "No usable sample in 2 shards in a row"), (junk, "50 images in a row")):
        with pytest.raises(InputError, match=sentence) as e:
            list(pipeline(path, make, train=True, epoch_samples=8, fault_limit=1.0, workers=workers))
        assert "Traceback" not in str(e.value)


def test_training_survives_and_counts_a_truncated_shard(folder, make):
    cut = folder / "s2.tar"
    cut.write_bytes(cut.read_bytes()[:6000])
    loader = pipeline(str(folder), make, train=True, epoch_samples=100, fault_limit=0.5, shuffle=5)
    batches = list(loader)
    assert loader.faults.counts["truncated_shard"] >= 2 and total(batches).counts == loader.faults.counts
    with pytest.raises(InputError, match="truncated_shard"):
        list(pipeline(str(folder), make, train=True, epoch_samples=100, fault_limit=0.001, shuffle=5))


# SIGTERM, which schedulers send to every process of a job


def _told_at_the_start(make, folder, handled, done):
    """Read the folder with two workers that send SIGTERM to the process group before their first own instruction."""
    from torch.utils.data._utils import signal_handling

    os.setpgrp()
    main, told = os.getpid(), []
    signal.signal(signal.SIGTERM, (lambda *_: told.append(os.getpid())) if handled else signal.SIG_DFL)
    set_handlers = signal_handling._set_worker_signal_handlers

    def send():
        os.killpg(0, signal.SIGTERM)  # before torch's handler, which obeys the parent alone and else ends the worker
        set_handlers()
        os.killpg(0, signal.SIGTERM)

    multiprocessing.util.register_after_fork(make, lambda _: os.killpg(0, signal.SIGTERM))
    signal_handling._set_worker_signal_handlers = send
    keys = [k for b in pipeline(folder, make, workers=2) for k in b.keys]
    done.send((len(keys), set(told) == {main}, len(multiprocessing.active_children())))


@pytest.mark.skipif(not hasattr(signal, "sigtimedwait"), reason="this system cannot wait for signals")
@pytest.mark.parametrize("handled", [True, False])
def test_sigterm_to_the_group_while_workers_start_is_the_main_process_s(folder, make, handled):
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    job = context.Process(target=_told_at_the_start, args=(make, str(folder), handled, there))
    job.start()
    there.close()
    assert here.poll(120)
    if handled:
        assert here.recv() == (25, True, 0)
        assert here.poll(120)
    with pytest.raises(EOFError):  # the last process that could write has ended: no worker outlives the main process
        here.recv()
    job.join()
    assert job.exitcode == (0 if handled else -signal.SIGTERM)


# Two ranks


def _rank(rank, make, folder, port, out):
    import datetime

    import torch.distributed as dist

    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60)
    )
    loader = pipeline(folder, make, rank=rank, world=2, fault_limit=1.0)
    n = torch.tensor(sum(len(b.uids) for b in loader))
    mine = int(n)
    dist.all_reduce(n)
    torch.save({"mine": mine, "all": int(n), "faults": loader.faults.to_dict()}, f"{out}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_with_uneven_shards_meet_again_and_sum_their_faults(tmp_path, make):
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    (tmp_path / "shards").mkdir()
    make.tar(tmp_path / "shards" / "0.tar", [*make.pairs(30), ("zero", {"png": b"", "txt": "t"})])
    make.tar(tmp_path / "shards" / "1.tar", [("zero", {"png": b"", "txt": "t"})])
    make.tar(tmp_path / "shards" / "2.tar", make.pairs(3, start=50))
    torch.multiprocessing.start_processes(
        _rank, (make, str(tmp_path / "shards"), port, str(tmp_path)), nprocs=2, start_method="fork"
    )
    found = [torch.load(tmp_path / f"{r}.pt") for r in range(2)]
    assert [f["mine"] for f in found] == [33, 0] and [f["all"] for f in found] == [33, 33]
    log = FaultLog()
    for f in found:
        log.merge(FaultLog.from_dict(f["faults"]).take())
    assert log.counts == {"broken_image": 2} and log.n_seen == 35


def test_images_that_need_not_be_there_are_decoded_where_they_are(tmp_path):
    with ShardWriter(tmp_path, "s") as w:
        for i in range(4):
            fields = {0: {}, 1: {"png": b"broken"}}.get(i, {"png": png(np.full((4, 4, 3), i, np.uint8))})
            w.write(f"k{i}", {"txt": f"caption {i}", **fields})
    seen = []

    def collate(samples):
        seen.extend((s.key, s.image is not None) for s in samples)
        columns = ([getattr(s, f) for s in samples] for f in ("uid", "caption", "key", "shard"))
        return ImageTextBatch(None, None, *columns)

    found = list(unit_batches(expand(str(tmp_path)), None, None, 8, collate=collate, need=("caption", IF_ANY)))
    assert seen == [("k0", False), ("k2", True), ("k3", True)]
    assert found[-1].batch.faults.counts == {"broken_image": 1}
