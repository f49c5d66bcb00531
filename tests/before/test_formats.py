"""Every numbered format: what an earlier version wrote is read, and what a newer one wrote is refused in a sentence.

The SAE folder has had two formats; of all others the first is the present one, so that their files here are what a
later version will have to read.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmsae import SAE, InputError
from mmsae.activations import ActivationStore
from mmsae.cli import main
from mmsae.filtering.pair_weights import PairWeights
from mmsae.info import describe
from mmsae.interpret.evidence.folder import Evidence
from mmsae.lvlm.weights.file import load_weights
from mmsae.metrics.concepts.names import names_only, read_names
from mmsae.metrics.concepts.query import read_query
from mmsae.sae.aligner import Aligner
from mmsae.sae.fingerprint import sae_fingerprint
from mmsae.steering import FeatureStats

ROOT = Path(__file__).parents[2]
FILES = Path(__file__).parent / "files"
PAIRED = "7c8bbd705172fec28b8f7ddd6a794c1d"
#: By the module that numbers it: a file that an earlier version wrote, where its number is, and what reads it.
FORMATS = {
    "sae/folder": ("sae/paired/cfg.json", ("mmsae", "format"), lambda: SAE.from_pretrained("sae/paired")),
    "sae/aligner": ("aligner/aligner.json", ("format",), lambda: Aligner.from_pretrained("aligner")),
    "activations/spec": ("store/spec.json", ("format_version",), lambda: ActivationStore("store")),
    "filtering/pair_weights": (
        "filter/weights.json",
        ("format",),
        lambda: PairWeights.load("filter/weights.safetensors"),
    ),
    "lvlm/weights/file": ("weights/weights.json", ("format",), lambda: load_weights("weights")),
    "steering/edits/units": ("steer/stats/stats.json", ("format",), lambda: FeatureStats.load("steer/stats")),
    "interpret/evidence/folder": ("evidence/evidence.json", ("format",), lambda: Evidence("evidence", PAIRED)),
    "metrics/concepts/names": ("query/names.json", ("format",), lambda: read_names("query/names.json", PAIRED)),
    "metrics/concepts/query": ("query/query.json", ("format",), lambda: read_query("query/query.json", PAIRED)),
}
#: Numbers of what is never read again.
NOT_READ = {
    "bench/names/run": "part of the job: what is kept of a seed in another format is made anew",
    "evaluation/images": "part of a cached file's name: one of another format is made anew",
    "interpret/browser/site": "a page for browsers; only its mark is looked for, when it is replaced",
}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A copy of the files, and the working folder."""
    shutil.copytree(FILES, tmp_path / "files", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.chdir(tmp_path / "files")


def test_every_format_that_has_a_number_is_here():
    numbered = {
        p.relative_to(ROOT / "mmsae").with_suffix("").as_posix()
        for p in (ROOT / "mmsae").rglob("*.py")
        if re.search(r"^(\w+, )*FORMAT(_VERSION)?(, \w+)* = ", p.read_text(), re.MULTILINE)
    }
    assert numbered == FORMATS.keys() | NOT_READ.keys()


@pytest.mark.parametrize("name", FORMATS)
def test_what_an_earlier_version_wrote_is_read(name):
    assert FORMATS[name][2]() is not None


@pytest.mark.parametrize("name", FORMATS)
def test_a_newer_one_is_refused_in_a_sentence(name):
    file, keys, load = FORMATS[name]
    said = inner = json.loads(Path(file).read_text())
    for key in keys[:-1]:
        inner = inner[key]
    assert isinstance(inner[keys[-1]], int)
    inner[keys[-1]] = 99
    Path(file).write_text(json.dumps(said))
    with pytest.raises(InputError) as e:
        load()
    assert re.search(r"99.*(this version reads|this mmsae (can read|reads))", str(e.value)) and "\n" not in str(e.value)


def test_format_1_of_the_sae_folder():
    want = load_file("format1/expected.safetensors")
    for name in ("paired", "plain"):
        about = json.loads(Path(f"format1/{name}/cfg.json").read_text())["mmsae"]
        sae = SAE.from_pretrained(f"format1/{name}")
        assert about["format"] == 1 and sae.modalities == tuple(about["modalities"]) and sae.selector.k == 4
        for m in sae.modalities:
            codes = sae.encode(want[f"{name}/{m}/x"], m)
            torch.testing.assert_close(codes.to_dense(), want[f"{name}/{m}/codes"], atol=1e-6, rtol=1e-6)
            torch.testing.assert_close(sae.decode(codes, m), want[f"{name}/{m}/x_hat"], atol=1e-6, rtol=1e-6)
        weights = sum(p.numel() for p in sae.parameters())
        assert describe(f"format1/{name}")["parameters"] == weights
        again = SAE.from_pretrained(sae.save_pretrained(f"now/{name}"))  # what is saved has the present format
        assert json.loads(Path(f"now/{name}/cfg.json").read_text())["mmsae"]["format"] == 2
        assert sae_fingerprint(again) == sae_fingerprint(sae)


def test_evidence_and_what_refers_to_it():
    found = Evidence("evidence", PAIRED)
    assert sae_fingerprint(SAE.from_pretrained("sae/paired")) == PAIRED
    assert found.about["n_items"] == 24 and found.about["job"]["hint"] == "local-dir:hosts/clip"
    assert read_query("query/query.json", PAIRED).name == "a test"
    assert names_only(read_names("query/names.json", PAIRED)) == {3: "red circle"}
    Path("older.json").write_text('{"3": "red circle"}')
    assert names_only(read_names("older.json")) == {3: "red circle"}


def test_a_folder_of_jobs_of_a_newer_version_is_another_job(capsys):
    """Jobs have no number: each field that identifies one is compared, and one that is not known here differs."""
    about = json.loads(Path("store_begun/job.json").read_text())
    about["a field of later"] = 1
    Path("store_begun/job.json").write_text(json.dumps(about))
    with pytest.raises(SystemExit) as e:
        main(["extract", "--host", "local-dir:hosts/clip", "--shards", "shards", "--batch-size", "4", "--workers", "0",
              "--device", "cpu", "--progress", "false", "--out", "store_begun"])  # fmt: skip
    assert e.value.code == 2 and "a field of later" in capsys.readouterr().err
