"""Extraction: rows belong to their uids, bad input is counted or refused, and kills leave no trace in the result."""

import errno
import json
import os
import random
import re
import resource
import signal
import sys
import tarfile
import time
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mmsae.activations import ActivationStore, extract, spool
from mmsae.cli import main
from mmsae.hosts import Encoder, load_host
from mmsae.shards import FaultLog, ShardWriter, decoder, read_shard
from mmsae.types import ImageTextBatch, InputError
from tests.helpers.stores import FakeHost, contents, forked, image_bytes, make_shards, peak

QUIET = {"workers": 0, "progress": False}


@pytest.fixture
def host():
    return FakeHost()


@pytest.fixture
def shards(tmp_path):
    return make_shards(tmp_path / "shards")


def expected(host, paths, site):
    """Rows as a plain loop over all samples gives them."""
    rows = []
    for path in paths:
        for s in read_shard(path, FaultLog()):
            images, ids = host.transform()(s.image)[None], host.tokenize([s.caption])
            rows.append(host._rows(ImageTextBatch(images, ids, [s.uid], [], [s.key], []), site).x)
    return torch.cat(rows)


def test_rows_belong_to_their_uids(host, shards, tmp_path):
    out = extract(host, shards, tmp_path / "s", batch_size=4, **QUIET)
    s = ActivationStore(out)
    samples = [s for p in shards for s in read_shard(p, FaultLog())]
    assert s.uids == [x.uid for x in samples] and s.keys == [x.key for x in samples]
    assert s.captions == [x.caption for x in samples]
    for m, site in host.default_sites().items():
        torch.testing.assert_close(s.load(modality=m), expected(host, shards, site))
        assert s.sites[m] == site
    assert [x.source for x in s.spec.shards] == [Path(p).name for p in shards]


def test_batches_never_cross_tars(host, shards, tmp_path):
    extract(host, shards, tmp_path / "s", batch_size=8, **QUIET)
    assert host.calls - 2 == 3 * 2  # ten samples a tar are batches of 8 and 2; two passes were the estimate


def test_the_result_does_not_depend_on_workers(host, shards, tmp_path):
    a = extract(host, shards, tmp_path / "a", batch_size=4, **QUIET)
    b = extract(host, shards, tmp_path / "b", batch_size=4, workers=2, progress=False)
    assert contents(a) == contents(b)


def test_several_sites_and_token_sites_from_one_pass(host, shards, tmp_path):
    sites = ["image.block[all]", "image.embed", "text.block[mask]"]
    s = ActivationStore(extract(host, shards, tmp_path / "s", sites=sites, batch_size=5, **QUIET))
    assert s.spec.rows == {"image/image.block:out[all]": 114, "image/image.embed:out[pooled]": 30, "text": 114}
    name = s.spec.resolve("image.block")
    t = s.tokens({"image": name}, {"image": s.rows_of_items(name, torch.tensor([0, 7]).numpy())})
    assert t.position["image"].tolist() == [0, 1, 2, 0, 1, 2, 3]  # the fake host leaves out one token in each batch
    assert t.item["image"].tolist() == [0, 0, 0, 1, 1, 1, 1] and t.uids == [s.uids[0], s.uids[7]]


def test_one_modality_needs_no_caption(tmp_path, host):
    with ShardWriter(tmp_path / "shards") as w:
        w.write("a", {"txt": "no image"})
        w.write("b", {"txt": ""})
    s = ActivationStore(
        extract(host, str(tmp_path / "shards"), tmp_path / "s", sites="text.embed", fault_limit=0.5, **QUIET)
    )
    assert s.keys == ["a"] and s.modalities == ["text"]
    assert s.spec.faults["counts"] == {"empty_caption": 1}


def test_disk_and_time_are_told_before_anything_runs(host, shards, tmp_path, capsys):
    extract(host, shards, tmp_path / "s", workers=0)
    out = capsys.readouterr().out
    assert "3 shards, about 30 samples" in out and "of float32 in" in out
    assert f"about 0 s on 1 x cpu; JPEGs are decoded by {decoder()}" in out
    assert "30 samples seen, 0 dropped" in out
    extract(host, shards, tmp_path / "s", workers=0)
    assert "finished before, 30 items; nothing to do" in capsys.readouterr().out


# Bad input.


def broken_shards(folder):
    """Six samples, of which two are good; a tar cut in its last sample; and an empty tar."""
    with ShardWriter(folder, "a") as w:
        for key, fields in {
            "good": {"png": (png := image_bytes(9)), "txt": "x"},
            "zero": {"png": b"", "txt": "x"},
            "nocap": {"png": png},
            "emptycap": {"png": png, "txt": "  "},
            "noimage": {"txt": "x"},
            "last": {"png": png, "txt": "y"},
        }.items():
            w.write(key, fields)
    path = make_shards(folder / "x", 1, 5)[0]
    data = Path(path).read_bytes()
    with tarfile.open(path) as tar:
        cut = tar.getmember("000004.png").offset_data + 10
    (folder / "b.tar").write_bytes(data[:cut])
    with tarfile.open(folder / "c.tar", "w"):
        pass
    return [str(folder / f) for f in ("a-000000.tar", "b.tar", "c.tar")]


def test_faults_are_counted_listed_and_survived(host, tmp_path, capsys):
    paths = broken_shards(tmp_path / "shards")
    s = ActivationStore(extract(host, paths, tmp_path / "s", workers=0, fault_limit=0.9))
    assert s.keys == ["good", "last", "000000", "000001", "000002", "000003"]
    assert [x.items for x in s.spec.shards] == [2, 4, 0]
    counts = {"broken_image": 1, "empty_caption": 1, "missing_caption": 1, "missing_image": 1, "truncated_shard": 1}
    assert s.spec.faults["counts"] == counts
    assert ["broken_image", "a-000000.tar", "zero", "png has 0 bytes"] in s.spec.faults["examples"]
    assert "truncated_shard 1" in capsys.readouterr().out


def test_too_many_faults_make_no_store_but_keep_the_work(host, tmp_path):
    paths = broken_shards(tmp_path / "shards")
    with pytest.raises(InputError, match=r"5 of 11 samples \(45.5%\).*limit of 5.0%"):
        extract(host, paths, tmp_path / "s", **QUIET)
    with pytest.raises(InputError, match="3 of 3 shards are done"):
        ActivationStore(tmp_path / "s")
    calls = host.calls
    extract(host, paths, tmp_path / "s", fault_limit=0.5, **QUIET)
    assert host.calls == calls  # nothing was computed again


def test_rows_that_are_not_finite_are_dropped(shards, tmp_path):
    s = ActivationStore(extract(FakeHost(spoil="000013"), shards, tmp_path / "s", batch_size=4, **QUIET))
    clean = ActivationStore(extract(FakeHost(), shards, tmp_path / "clean", batch_size=4, **QUIET))
    kept = [u for u, k in zip(clean.uids, clean.keys, strict=True) if k != "000013"]
    assert s.uids == kept and s.spec.faults["counts"] == {"not_finite": 1}
    assert torch.equal(s.load(modality="image"), clean.load(modality="image", uids=kept))


@pytest.mark.parametrize("twin", [13, 25], ids=["in one tar", "in two tars"])
def test_duplicate_uids_are_refused_by_name(host, tmp_path, twin):
    paths = make_shards(tmp_path / "shards", uid=lambda i: f"{11 if i == twin else i:032x}")
    with pytest.raises(InputError, match=f"uid {11:032x} occurs twice.*'000011'.*'0000{twin}'"):
        extract(host, paths, tmp_path / "s", **QUIET)
    assert not (tmp_path / "s" / "spec.json").exists()


def test_other_wrong_input(host, shards, tmp_path):
    out = tmp_path / "s"
    for change, words in {
        "no shards": ({"shards": str(tmp_path / "nothing-*.tar")}, "No shard matches"),
        "no site": ({"sites": "audio.embed"}, "no module audio.embed"),
        "one site twice": ({"sites": ["image.embed", "image.embed"]}, "given twice"),
        "dtype": ({"dtype": "int8"}, "dtype int8"),
        "batch": ({"batch_size": 0}, "batch_size is 0"),
        "devices": ({"devices": 2}, "devices is 2"),
    }.values():
        with pytest.raises(InputError, match=words):
            extract(**({"host": host, "shards": shards, "out": out} | QUIET | change))
        assert not out.exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"batch_size": 3}, "its batch_size is 4 there and 3 here"),
        ({"dtype": "bfloat16"}, "dtype"),
        ({"sites": "image.embed"}, "sites"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_a_folder_of_another_job_is_refused(host, shards, tmp_path, change, words, finished):
    out = tmp_path / "s"
    extract(host, shards, out, batch_size=4, **QUIET)
    if not finished:
        (out / "job.json").write_text(_job(out))
        (out / "spec.json").unlink()
    before = contents(out)
    with pytest.raises(InputError, match=f"another job.*{words}"):
        extract(**({"host": host, "shards": shards, "out": out, "batch_size": 4} | QUIET | change))
    assert contents(out) == before


def _job(out):
    spec = json.loads((out / "spec.json").read_text())
    sites = {n: {k: v for k, v in s.items() if k != "hint"} for n, s in spec["sites"].items()}
    return json.dumps({"sites": sites, "dtype": spec["dtype"], "units": len(spec["shards"]), "job": spec["job"]})


# Full disks.


def test_what_will_not_fit_is_refused_before_it_starts(host, shards, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["mmsae.activations.extract"], "free_bytes", lambda folder: 1000)
    with pytest.raises(InputError, match=r"s: about .* kB are needed and 1.0 kB are free.*float16 or bfloat16"):
        extract(host, shards, tmp_path / "s", **QUIET)
    assert not (tmp_path / "s").exists()


def test_a_part_is_refused_for_its_own_shards(host, shards, tmp_path, monkeypatch, capsys):
    """The second of five parts has one of three shards, which is a third of what all of them take."""
    asked = []
    for part in ("1/1", "2/5"):
        monkeypatch.setattr(sys.modules["mmsae.activations.extract"], "free_bytes", lambda folder: 1000)
        with pytest.raises(InputError, match=r"about .* kB are needed and 1\.0 kB are free") as e:
            extract(host, shards, tmp_path / "s", part=part, **QUIET)
        asked.append(float(re.search(r"about ([\d.]+) kB", str(e.value))[1]))
    assert len(shards) == 3 and asked[1] < 0.6 * asked[0]
    extract(host, shards, tmp_path / "s", part="4/5", **QUIET)  # it has none
    monkeypatch.undo()
    assert extract(host, shards, tmp_path / "s", part="2/5", **{**QUIET, "progress": True}) is None
    assert "1 shards, about 10 samples: " in capsys.readouterr().out


@pytest.mark.parametrize("where", ["rows", "join", "index", "spec"])
def test_a_disk_that_fills_up_leaves_whole_parts_and_can_be_resumed(host, shards, tmp_path, monkeypatch, where):
    whole = extract(host, shards, tmp_path / "whole", batch_size=4, **QUIET)
    out, calls = tmp_path / "s", [0]

    def failing(real, at):
        def call(*args):
            calls[0] += 1
            if calls[0] == at:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*args)

        return call

    with monkeypatch.context() as m:
        if where == "rows":
            m.setattr(spool.Spool, "append", failing(spool.Spool.append, 9))
        elif where == "join":
            m.setattr(spool.Spool, "finish", failing(spool.Spool.finish, 2))
        else:
            m.setattr(os, "fsync", failing(os.fsync, {"index": 9, "spec": 17}[where]))
        with pytest.raises(InputError, match=rf"{out}: no space left .*: about .*B more are needed and .*B are free"):
            extract(host, shards, out, batch_size=4, **QUIET)
    assert not any(name.endswith(".tmp") for name in contents(out)) and "spec.json" not in contents(out)
    for name, data in contents(out).items():
        assert name in ("job.json", "units.json") or data == contents(whole)[name]
    with pytest.raises(InputError, match="unfinished"):
        ActivationStore(out)
    assert contents(extract(host, shards, out, batch_size=4, **QUIET)) == contents(whole)


def test_a_real_limit_on_writing(shards, tmp_path):
    """The system itself refuses the write, at 64 kB a file, in a process of its own."""

    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
        try:
            extract(FakeHost(width=2000), shards, tmp_path / "s", batch_size=4, **QUIET)
        except InputError as e:
            (tmp_path / "said").write_text(str(e))

    assert forked(work) == 0
    said = (tmp_path / "said").read_text()
    assert "no space left to write to (File too large)" in said and "are free" in said
    assert not (tmp_path / "s").exists()  # not one part was finished, so nothing is left


# Kills.


def counted(monkeypatch, act):
    """Call ``act(n)`` before the n-th step that touches the disk."""
    n = [0]

    def wrap(owner, name):
        real = getattr(owner, name)

        def call(*args, **kw):
            n[0] += 1
            act(n[0])
            return real(*args, **kw)

        monkeypatch.setattr(owner, name, call)

    for owner, name in ((os, "fsync"), (os, "replace"), (spool.Spool, "append"), (Path, "unlink")):
        wrap(owner, name)
    real = spool.Spool._blocks

    def blocks(self, *args):
        for block in real(self, *args):
            n[0] += 1
            act(n[0])
            yield block
            self._out.flush()  # so that a kill at the next step leaves a half-written file

    monkeypatch.setattr(spool.Spool, "_blocks", blocks)
    return n


def test_a_kill_at_any_step_of_writing_changes_nothing(host, tmp_path, monkeypatch):
    shards = make_shards(tmp_path / "shards", 2, 3)
    whole = contents(extract(host, shards, tmp_path / "whole", **QUIET))
    with monkeypatch.context() as m:
        steps = counted(m, lambda n: None)
        extract(host, shards, tmp_path / "count", **QUIET)
    assert steps[0] > 30
    for kill in range(1, steps[0] + 1):
        out = tmp_path / f"s{kill}"

        def work(kill=kill, out=out):
            counted(monkeypatch, lambda n: os.kill(os.getpid(), signal.SIGKILL) if n == kill else None)
            extract(FakeHost(), shards, out, **QUIET)

        assert forked(work) == -signal.SIGKILL
        if (out / "spec.json").exists():
            ActivationStore(out, verify=True)
        else:
            with pytest.raises(InputError):
                ActivationStore(out)
        assert contents(extract(host, shards, out, **QUIET)) == whole, kill


def test_kills_at_random_moments_change_nothing(tmp_path):
    class Slow(FakeHost):
        def read(self, batch, sites, gradient=""):
            time.sleep(0.02)  # 0.4 s for all 20 batches
            return super().read(batch, sites)

    shards = make_shards(tmp_path / "shards", 4, 10)
    whole = contents(extract(FakeHost(), shards, tmp_path / "whole", batch_size=2, **QUIET))
    rng, out, kills = random.Random(0), tmp_path / "s", 0
    while kills < 10 and not (out / "spec.json").exists():
        code = forked(lambda: extract(Slow(), shards, out, batch_size=2, **QUIET), after=rng.uniform(0.01, 0.19))
        kills += code == -signal.SIGKILL
    assert kills >= 2
    assert contents(extract(FakeHost(), shards, out, batch_size=2, **QUIET)) == whole


# Memory.


def test_memory_does_not_grow_with_shards_or_their_size(tmp_path):
    width, per_shard = 8192, 100  # 6.5 MB of rows a shard

    def job(n, name):
        paths = make_shards(tmp_path / name, n, per_shard)
        warm = paths[:1]
        return lambda i: extract(
            FakeHost(width), paths if i else warm, tmp_path / f"{name}-{i}", batch_size=10, **QUIET
        )

    few, many = peak(job(2, "few")), peak(job(8, "many"))
    row_bytes = 2 * 4 * width * per_shard
    print("PEAK", few, many, row_bytes)
    assert many < few + row_bytes, (few, many)
    assert many < 4 * row_bytes, many


def tiny_clip(folder):
    """A CLIP with random weights, saved in open_clip's own folder format."""
    vision = {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8}
    text = {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    config = {"model_cfg": {"embed_dim": 6, "vision_cfg": vision, "text_cfg": text}, "preprocess_cfg": {"size": 16}}
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        host = load_host(f"local-dir:{folder}", allow_random=True)
    save_file(host.model.state_dict(), folder / "open_clip_model.safetensors")
    return f"local-dir:{folder}"


@pytest.mark.slow
def test_the_command_with_two_processes(tmp_path, capsys):
    """Equal bytes from one process and from two; one sentence and exit code 2 for what is wrong."""
    make_shards(tmp_path / "shards", 5, 6, size=16)
    host = tiny_clip(tmp_path / "host")

    def run(out, **options):
        given = {"host": host, "shards": tmp_path / "shards", "out": tmp_path / out, "batch_size": 4, "workers": 0}
        main(["extract", *(f"--{k}={v}" for k, v in (given | options).items())])

    run("one", device="cpu")
    run("two", device="cpu", devices=2)
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert len(ActivationStore(tmp_path / "one")) == 30
    with pytest.raises(SystemExit) as stop:
        run("one", device="cpu", batch_size=5)
    assert stop.value.code == 2
    assert "its batch_size is 4 there and 5 here" in capsys.readouterr().err.splitlines()[-1]


def test_a_device_without_memory_is_one_sentence_and_what_is_done_is_kept(tmp_path, capfd, monkeypatch):
    """Torch's error, where a device would raise it: for every batch, and for that of one shard."""
    paths = make_shards(tmp_path / "shards", 3, 4, size=16)
    host, read = tiny_clip(tmp_path / "host"), Encoder.read
    last = next(iter(read_shard(paths[-1], FaultLog()))).uid
    args = ["extract", f"--host={host}", f"--shards={tmp_path / 'shards'}", "--batch-size=4", "--workers=0"]

    def full(of):
        def reads(self, batch, *args, **kwargs):
            if of in ("", batch.uids[0]):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return read(self, batch, *args, **kwargs)

        return reads

    for of, said in (("", "no memory is left ("), (last, "1 of 3 shards failed, the others are done")):
        with monkeypatch.context() as m, pytest.raises(SystemExit) as stop:
            m.setattr(Encoder, "read", full(of))
            main([*args, "--device=auto", f"--out={tmp_path / 'out'}"])
        error = capfd.readouterr().err
        assert stop.value.code == 2 and "Traceback" not in error and f"mmsae: error: {said}" in error
        assert "Tried to allocate 2.00 GiB" in error
        assert error.endswith(
            ": lower --batch-size (now 4) or give --precision bf16 or give --device cpu, which is slow\n"
        )
    main([*args, "--device=auto", f"--out={tmp_path / 'out'}"])
    main([*args, "--device=cpu", f"--out={tmp_path / 'want'}"])
    assert contents(tmp_path / "out") == contents(tmp_path / "want")
