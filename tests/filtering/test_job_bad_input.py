"""Filtering of bad input: one sentence, nothing half-written; broken samples are counted, listed and survived."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mmsae import SAE
from mmsae.cli import main
from mmsae.metrics.concepts.names import LatentName, write_names
from mmsae.sae import TopK
from mmsae.sae.fingerprint import sae_fingerprint
from mmsae.shards import FaultLog, ShardWriter, expand, read_shard
from mmsae.types import InputError
from tests.helpers.filtering import QUIET, filter_shards, make_host, make_shards, results, tree


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("bad")
    make_host(root)
    make_host(root, "other", seed=1)
    make_shards(root / "shards", 32)
    return root


@pytest.fixture
def run(root, tmp_path):
    def run(**more):
        base = {"sae": str(root / "clip-sae"), "shards": str(root / "shards"), "out": str(tmp_path / "out")}
        return Path(filter_shards(**{**base, **QUIET, **more}))

    return run


def image(mode="RGB", kind="PNG", seed=0):
    data = np.random.default_rng(seed).integers(0, 255, (20, 24, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(data).convert(mode).save(out, kind)
    return out.getvalue()


def test_broken_samples_are_counted_and_survived(run, tmp_path):
    shards = tmp_path / "in"
    with ShardWriter(shards, "a") as w:
        for i in range(12):
            w.write(f"good{i}", {"png": image(seed=i), "txt": f"a red circle {i}"})
        w.write("cmyk", {"jpg": image("CMYK", "JPEG"), "txt": "a blue square"})
        w.write("grey16", {"png": image("I;16"), "txt": "a small circle"})
        w.write("zero", {"png": b"", "txt": "nothing"})
        w.write("half", {"png": image()[:200], "txt": "half"})
        w.write("silent", {"png": image()})
    whole = (shards / "a-000000.tar").read_bytes()
    (shards / "b.tar").write_bytes(whole[: len(whole) // 3])
    (shards / "c.tar").write_bytes(b"")
    out = run(shards=str(shards), fault_limit=0.5, keep=1.0)
    table = pq.read_table(out / "scores.parquet").to_pydict()
    assert {"cmyk", "grey16", "good0"} <= set(table["key"]) and not {"zero", "half", "silent"} & set(table["key"])
    counts = results(out)["faults"]["counts"]
    assert counts["broken_image"] == 2 and counts["missing_caption"] == 1 and counts["truncated_shard"] == 2
    assert results(out)["kept"] == len(table["key"]) and all(table["kept"])


def test_a_shard_without_captions_is_refused(run, tmp_path):
    with ShardWriter(tmp_path / "in", "silent") as w:
        for i in range(5):
            w.write(f"{i}", {"png": image(seed=i)})
    with pytest.raises(
        InputError, match=r"no usable pair in the 1 shards that weights are fitted on: missing_caption 5"
    ):
        run(shards=str(tmp_path / "in"))
    assert not (tmp_path / "out").exists()


def test_an_sae_of_another_site_is_refused(root, run, tmp_path):
    with pytest.raises(InputError, match="was trained on"):
        run(host=f"local-dir:{root / 'other'}")
    assert [p.name for p in tmp_path.iterdir()] == []
    assert results(run(host=f"local-dir:{root / 'other'}", allow_other_site=True))["kept"] == 16
    one = SAE(16, 20, modalities=("image",), selector=TopK(4))
    one.save_pretrained(tmp_path / "one")
    with pytest.raises(InputError, match="pair scores need image and text"):
        run(sae=str(tmp_path / "one"), host=f"local-dir:{root / 'clip'}")
    free = SAE(16, 20, selector=TopK(4))
    free.save_pretrained(tmp_path / "free")
    with pytest.raises(InputError, match="name it with --host"):
        run(sae=str(tmp_path / "free"))


def test_names_of_another_sae_are_refused_and_those_of_this_one_are_used(root, run, tmp_path):
    names = {j: LatentName(f"thing {j}") for j in range(40)}
    mine = write_names(tmp_path / "mine.json", names, sae_fingerprint(SAE.from_pretrained(root / "clip-sae")))
    other = write_names(tmp_path / "other.json", names, "0" * 32)
    with pytest.raises(InputError, match=r"other\.json names latents of SAE 000000000000, not of"):
        run(names=str(other))
    called = json.loads((run(names=str(mine)) / "pair_weights.json").read_text())["concepts"]
    assert called and all(c["label"] == f"thing {j}" for j, c in called.items())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"keep": 0.0}, r"keep is 0\.0"),
        ({"keep": 1.5}, r"keep is 1\.5"),
        ({"score": "best"}, "no score 'best'"),
        ({"score": "cos_code"}, "vision-language LLM"),
        ({"score": "pair_calibrated"}, "--calibration"),
        ({"select": "match"}, "target"),
        ({"target": "x"}, "only match takes one"),
        ({"balance": 2.0, "select": "cover"}, r"balance is 2\.0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"weights": "nothing.safetensors"}, r"nothing\.safetensors cannot be read"),
        ({"shards": "nothing-*.tar"}, "No shard matches"),
        ({"names": "nothing.json"}, r"nothing\.json cannot be read: No such file"),
        ({"names": __file__}, "is not a JSON object"),
        ({"workers": -1}, "workers is -1"),
        ({"fault_limit": 7.0}, r"fault_limit is 7\.0"),
        ({"device": "gpu"}, "device is 'gpu'; it must be cpu, cuda or auto"),
        ({"text": "question+answer"}, "CLIP-like and reads the caption"),
    ],
)
def test_wrong_arguments_are_named_and_leave_nothing(run, tmp_path, change, words):
    with pytest.raises(InputError, match=words):
        run(**change)
    assert list(tmp_path.iterdir()) == []


def test_a_uid_that_occurs_twice_is_refused(run, tmp_path):
    with ShardWriter(tmp_path / "in", "a", per_shard=3) as w:
        for i in range(6):
            w.write(f"{i}", {"png": image(seed=i), "txt": "a circle", "json": {"uid": f"{i % 5:032x}"}})
    with pytest.raises(InputError, match=f"uid {0:032x} of key 5"):
        run(shards=str(tmp_path / "in"))
    assert not (tmp_path / "out").exists()


def test_two_sets_whose_tars_have_equal_names(run, tmp_path):
    for n in ("x", "y"):
        with ShardWriter(tmp_path / n, "0", per_shard=4) as w:
            for i in range(8):
                w.write(f"{i}", {"png": image(seed=i + 10 * (n == "y")), "txt": f"a circle {n} {i}"})
    out = run(shards=[str(tmp_path / "x"), str(tmp_path / "y")], keep=0.5)
    table = pq.read_table(out / "scores.parquet").to_pydict()
    assert len(set(table["uid"])) == 16 and set(table["shard"]) == {f"{n}/0-00000{i}.tar" for n in "xy" for i in "01"}
    kept = [s.caption for p in expand(str(out / "shards")) for s in read_shard(p, FaultLog())]
    assert kept == [c for c, k in zip(table["caption"], table["kept"], strict=True) if k]


def test_members_keep_their_spelling_but_lead_nowhere_else(run, tmp_path):
    with ShardWriter(tmp_path / "in", "a") as w:
        for i in range(6):
            w.write(f"k{i}", {"PNG": image(seed=i), "Txt": f"a circle {i}", "Note": b"n"})
    tar = tmp_path / "in" / "a-000000.tar"
    inside = tarfile.open(tar).getnames()
    with tarfile.open(tar) as old, tarfile.open(tmp_path / "in.tar", "w") as new:
        for m in old.getmembers():
            content = old.extractfile(m).read()
            m.name = m.name.replace("k5.", "../../k5.").replace("k4.", "/k4.")
            new.addfile(m, io.BytesIO(content))
    assert inside[:3] == ["k0.PNG", "k0.Txt", "k0.Note"]
    out = run(shards=str(tmp_path / "in.tar"), keep=1.0)
    assert tarfile.open(next((out / "shards").iterdir())).getnames() == inside
    assert "../../k5" in pq.read_table(out / "scores.parquet")["key"].to_pylist()


def test_weights_of_another_sae_are_refused(root, run, tmp_path):
    weights = str(run() / "pair_weights.safetensors")
    with pytest.raises(InputError, match="was fitted for sae"):
        run(sae=str(root / "other-sae"), weights=weights, out=str(tmp_path / "b"))
    with pytest.raises(InputError, match="no pair_calibrated"):
        run(weights=weights, score="pair_calibrated", out=str(tmp_path / "c"))
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    with pytest.raises(InputError, match="are not weights of pair scores"):
        run(weights=str(tmp_path / "junk.safetensors"), out=str(tmp_path / "d"))


def test_folders_of_other_jobs_are_refused(run, tmp_path):
    out = run()
    before = tree(out)
    with pytest.raises(InputError, match=r"its keep is 0\.5 there and 0\.3 here"):
        run(keep=0.3)
    assert tree(out) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(InputError, match="holds no result"):
        run(out=str(tmp_path / "mine"))
    (tmp_path / "b.partial").mkdir()
    (tmp_path / "b.partial" / "thesis.txt").write_text("x")
    with pytest.raises(InputError, match="holds no unfinished job"):
        run(out=str(tmp_path / "b"))
    assert (tmp_path / "b.partial" / "thesis.txt").exists()


def test_keys_that_start_anew_in_every_tar_are_kept(run, tmp_path):
    make_shards(tmp_path / "in", 32, 16, keys=lambda i: f"{i % 16:05d}")
    out = run(shards=str(tmp_path / "in"), keep=1.0, per_shard=100)
    assert len(list((out / "shards").iterdir())) == 2 and results(out)["kept"] == 32


def test_the_command_says_it_in_one_line(root, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["filter", "--sae", str(root / "clip-sae"), "--shards", "nothing.tar", "--out", str(tmp_path / "o")])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith("mmsae: error: ") and said.count("\n") == 1


def test_a_job_keeps_the_batch_size_that_it_was_begun_with(root, tmp_path, monkeypatch):
    from mmsae.filtering.job import FilterJob
    from mmsae.hosts import Host
    from mmsae.options import SAERun

    def planned(out):
        run = SAERun(workers=0, progress=False, device="cpu")
        return FilterJob(str(root / "clip-sae"), str(root / "shards"), str(tmp_path / out), run=run)

    own = planned("new")
    assert own.scoring_pass.batch_size == own.folder.job["batch_size"] == own.worker.host.batch_size() == 256
    whole, begun = tmp_path / "whole", tmp_path / "begun.partial"
    for folder, file, content in (
        (whole, "results.json", {"job": own.folder.job}),
        (begun, "job.json", own.folder.job),
    ):
        folder.mkdir()
        (folder / file).write_text(json.dumps(content))
    monkeypatch.setattr(Host, "batch_size", lambda self, asked=None: 7 if asked is None else asked)
    for out in ("whole", "begun"):  # on a machine that would choose another number
        assert planned(out).scoring_pass.batch_size == 256
    assert planned("new").scoring_pass.batch_size == 7
