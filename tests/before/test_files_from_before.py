"""Files that version 0.2.0.dev0 wrote before its modules moved load, mean the same, and unfinished jobs go on.

``files/make.py`` says how each was made. Every test works in a copy, so that what is done there leaves no trace.
"""

import json
import os
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from mmsae import load_pair
from mmsae.activations import ActivationStore, extract
from mmsae.bench.stages import stages_of
from mmsae.demo.stages import stage_log
from mmsae.evaluation.features import load_features
from mmsae.evaluation.zeroshot.command import zeroshot
from mmsae.filtering.pair_weights import PairWeights
from mmsae.hosts import load_host
from mmsae.hosts.diffusion.patch_autoencoder import PatchAutoencoder
from mmsae.lvlm.decoding.settings import Settings
from mmsae.lvlm.hallucination.chair import chair_command
from mmsae.lvlm.hallucination.pope import pope
from mmsae.lvlm.hallucination.questions import load_questions
from mmsae.lvlm.patches.command import patches
from mmsae.lvlm.weights.command import weights
from mmsae.lvlm.weights.file import load_top, load_weights
from mmsae.options import call
from mmsae.sae import SAE
from mmsae.sae.aligner import Aligner
from mmsae.steering import FeatureStats
from mmsae.steering.command import steer
from mmsae.steering.methods.unlearn import ConceptStats
from mmsae.training.cli import run as lightning
from mmsae.training.sweep import sweep
from mmsae.types import InputError
from mmsae.world.measure.probe import WorldProbe
from tests.helpers.filtering import filter_shards

FILES = Path(__file__).parent / "files"
SAES = sorted(p.name for p in (FILES / "sae").iterdir())
QUIET = {"workers": 0, "progress": False, "device": "cpu"}
ASKING = {"device": "cpu", "progress": False, "batch_size": 4}
EXTRACT = {"host": "local-dir:hosts/clip", "shards": "shards", "batch_size": 4, **QUIET}
FILTER = {"sae": "sae/paired", "shards": "shards", "keep": 0.5, "batch_size": 4, "per_shard": 4, "fit_samples": 16}
WEIGHTS = {"sae": "sae/tokens", "shards": "questions", "samples": None, "batch_size": 4, "n_side": 2, "n_pool": 4}
MATCH = {**FILTER, "select": "match", "target": "questions", "select_on": "text", "balance": 0.5}
LVLM = {"sae": "sae/tokens", "shards": "questions", "score": "cos_code", "batch_size": 4, "fit_samples": 8}
PATCHES = {"sae": "sae/tokens", "shards": "questions", "scores": ["l0", "norm", "random"], "keep": [0.5], **ASKING}
SHORT = {"host": "lvlm:hosts/llava", "shards": "questions", "settings": Settings(max_new_tokens=3, do_sample=False)}
ASKED = {**ASKING, "per_image": 1, "min_objects": 1}
STEER = {
    "host": "diffusers:hosts/sd",
    "sae": "sae/words",
    "prompts": ["a red circle", "a blue square"],
    "features": [3],
}
STEER |= {"op": "set", "unit": "raw", "strengths": [2.0], "seeds": [0, 1], "steps": 2, "controls": 1, "batch_size": 2}
STEER |= {"device": "cpu", "progress": False}
#: The function, its options, and an option of another job, by the folder of the result.
JOBS = {
    "store": (extract, EXTRACT, {"batch_size": 3}),
    "filter": (filter_shards, {**FILTER, **QUIET}, {"keep": 0.25}),
    "weights": (partial(call, weights), {**WEIGHTS, **QUIET}, {"seed": 1}),
    "patches": (partial(call, patches), PATCHES, {"seed": 1}),
    "pope": (partial(call, pope), {**SHORT, **ASKED}, {"seed": 1}),
    "chair": (partial(call, chair_command), {**SHORT, **ASKING}, {"seed": 1}),
    "steer": (partial(call, steer), STEER, {"strengths": [3.0]}),
}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A copy of the files, and the working folder."""
    shutil.copytree(FILES, tmp_path / "files", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.chdir(tmp_path / "files")


@pytest.fixture
def written(monkeypatch):
    """``FOLDER/NAME`` of all that took its place."""
    seen = []
    for name in ("replace", "rename"):
        move = getattr(os, name)

        def noted(a, b, *args, move=move, **options):
            seen.append("/".join(Path(b).parts[-2:]))
            return move(a, b, *args, **options)

        monkeypatch.setattr(os, name, noted)
    return seen


def expected(name):
    path = Path("expected") / name
    return load_file(path) if path.suffix == ".safetensors" else json.loads(path.read_text())


def close(got, want):
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)


def alike(got, want, skip=(), rel=1e-5):
    """Plain values: the same shape, numbers close, all else equal."""
    if isinstance(want, dict):
        assert set(got) >= set(want) - set(skip)
        for key in set(want) - set(skip):
            alike(got[key], want[key], skip, rel)
    elif isinstance(want, list):
        assert len(got) == len(want)
        for a, b in zip(got, want, strict=True):
            alike(a, b, skip, rel)
    else:
        assert got == (pytest.approx(want, rel=rel, abs=1e-6, nan_ok=True) if isinstance(want, float) else want)


def tables(got, want, floats=1e-5):
    a, b = (pq.read_table(p).to_pydict() for p in (got, want))
    alike(a, b, rel=floats)


def read(path):
    return json.loads(Path(path).read_text())


@pytest.mark.parametrize("name", SAES)
def test_an_sae_computes_what_it_did(name):
    sae, want = SAE.from_pretrained(f"sae/{name}"), expected("saes.safetensors")
    about = read(f"sae/{name}/cfg.json")["mmsae"]
    assert sae.modalities == tuple(about["modalities"]) and sae.selector.k == 4
    assert {m: s.to_dict() for m, s in sae.sites.items()} == about["sites"]
    for m in sae.modalities:
        codes = sae.encode(want[f"{name}/{m}/x"], m)
        assert torch.equal(codes.to_dense() != 0, want[f"{name}/{m}/codes"] != 0)
        close(codes.to_dense(), want[f"{name}/{m}/codes"])
        close(sae.decode(codes, m), want[f"{name}/{m}/x_hat"])


@pytest.mark.parametrize(
    "host, names",
    [("local-dir:hosts/clip", "plain shared paired dual vl"), ("lvlm:hosts/llava", "tokens"),
     ("diffusers:hosts/sd", "words")],
)  # fmt: skip
def test_a_host_is_the_one_that_its_saes_know(host, names):
    loaded = load_host(host)
    for name in names.split():
        sae = SAE.from_pretrained(f"sae/{name}")
        assert {s.hint for s in sae.sites.values()} == {host}
        sae.attach(loaded)


def test_the_pipeline_draws_what_it_drew():
    host = load_host("diffusers:hosts/sd")
    close(host.generate(["a red circle"], steps=2, guidance=3.0, seed=0), expected("steer.safetensors")["images"])
    assert type(StableDiffusionPipeline.from_pretrained("hosts/sd").vae) is PatchAutoencoder


def test_an_aligner_maps_as_it_did():
    aligner, want = Aligner.from_pretrained("aligner"), expected("saes.safetensors")
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(3))
    for m in ("image", "text"):
        e = aligner.align(x, m)
        close(e, want[f"aligner/{m}/e"])
        close(aligner.unalign(e, m), want[f"aligner/{m}/x"])


def test_a_store_holds_what_it_held():
    store, want = ActivationStore("store", verify=True), expected("store.safetensors")
    at = np.arange(len(store))
    assert len(store) == 24 and store.uids[5] == f"{5 * 7919:032x}"
    for m, x in want.items():
        assert torch.equal(store.tokens({m: m}, {m: at}).x[m], x)
    assert ActivationStore("pairs", verify=True).d_in == 8


@pytest.mark.parametrize("name", JOBS)
def test_a_finished_job_is_known_as_finished(name, written):
    job, options, other = JOBS[name]
    before = {p: p.read_bytes() for p in Path(name).rglob("*") if p.is_file()}
    job(**options, out=name)
    assert not [w for w in written if w.split("/")[-1].startswith(("shard-", "0000"))]
    changed = {p.name for p, data in before.items() if p.read_bytes() != data}
    assert changed <= {"table.parquet", "table.csv", "results.json"} if name == "steer" else not changed
    with pytest.raises(InputError):
        job(**{**options, **other}, out=name)


def test_an_unfinished_extraction_goes_on(written):
    extract(out="store_begun", **EXTRACT)
    assert "store_begun/shard-00000.parquet" not in written and "store_begun/shard-00002.parquet" in written
    got, want = ActivationStore("store_begun"), expected("store.safetensors")
    assert got.uids == ActivationStore("store").uids
    for m, x in want.items():
        close(got.tokens({m: m}, {m: np.arange(24)}).x[m], x)


@pytest.mark.parametrize("stage", ["fitting", "scoring"])
def test_an_unfinished_filter_goes_on(stage, written):
    out = f"filter_{stage}"
    done = ["/".join(p.parts[-2:]) for p in Path(f"{out}.partial").rglob("*.part")]
    filter_shards(out=out, **FILTER, **QUIET)
    assert len(done) == 1 and done[0] not in written and done[0].replace("fit/", "score/") in [*written, *done]
    assert np.array_equal(np.load(f"{out}/uids.npy"), np.load("filter/uids.npy"))
    tars = sorted(p.name for p in Path("filter/shards").iterdir())
    for tar in tars:
        assert (Path(out) / "shards" / tar).read_bytes() == (Path("filter/shards") / tar).read_bytes()
    assert sorted(p.name for p in Path(f"{out}/shards").iterdir()) == tars and not Path(f"{out}.partial").exists()
    tables(f"{out}/scores.parquet", "filter/scores.parquet")
    alike(read(f"{out}/results.json"), read("filter/results.json"))
    weights = load_file(f"{out}/pair_weights.safetensors")
    for key, value in load_file("filter/weights.safetensors").items():
        close(weights[key], value)


@pytest.mark.parametrize("name, options", [("filter_matching", MATCH), ("filter_lvlm", LVLM)])
def test_an_unfinished_filter_of_another_kind_goes_on(name, options, written):
    done = ["/".join(p.parts[-2:]) for p in Path(f"{name}.partial").rglob("*.part")]
    filter_shards(out=name, **options, **QUIET)
    assert len(done) == 3 and not set(done) & set(written)
    assert np.array_equal(np.load(f"{name}/uids.npy"), np.load(f"expected/{name}/uids.npy"))
    tables(f"{name}/scores.parquet", f"expected/{name}/scores.parquet")
    alike(read(f"{name}/results.json"), read(f"expected/{name}/results.json"))


def test_pair_weights_of_an_earlier_filter_are_taken():
    fitted = PairWeights.load("filter/weights.safetensors")
    assert {str(j) for j in fitted.concepts} == set(read("filter/weights.json")["concepts"])
    filter_shards(out="again", **FILTER, weights="filter/weights.safetensors", **QUIET)
    tables("again/scores.parquet", "filter/scores.parquet")


def test_cross_modal_weights_belong_to_their_sae_and_host():
    found = load_weights("weights")
    found.check(SAE.from_pretrained("sae/tokens"), load_host("lvlm:hosts/llava").fingerprint)
    top = load_top("weights", 16, [name for name, _ in found.info["data"]])
    assert set(top) == {"image", "text"} and found.info["weighted"] == int(found.weights.isfinite().sum()) > 0


def test_unfinished_weights_go_on(written):
    call(weights, out="weights_begun", **WEIGHTS, **QUIET)
    assert not any(w.startswith("parts/000000-") for w in written) and any(
        w.startswith("parts/000001-") for w in written
    )
    got, want = load_weights("weights_begun"), load_weights("weights")
    torch.testing.assert_close(got.weights, want.weights, atol=1e-6, rtol=1e-6, equal_nan=True)
    alike(got.info, want.info)
    tables("weights_begun/top_tokens.parquet", "weights/top_tokens.parquet")


@pytest.mark.parametrize("name", ["patches", "pope", "chair"])
def test_unfinished_questions_go_on(name, written):
    job, options, _ = JOBS[name]
    job(**options, out=f"{name}_begun")
    assert not any(w.startswith("parts/000000-") for w in written) and any(
        w.startswith("parts/000001-") for w in written
    )
    alike(read(f"{name}_begun/results.json"), read(f"{name}/results.json"))


def test_questions_that_were_saved_are_read():
    assert len(load_questions("pope/questions_random.json")) == 16


def test_an_unfinished_steering_goes_on(written):
    call(steer, **STEER, out="steer_begun")
    assert "parts/00000.parquet" not in written and "parts/00001.parquet" in written
    tables("steer_begun/table.parquet", "steer/table.parquet", 1e-4)
    alike(read("steer_begun/results.json"), read("steer/results.json"), rel=1e-4)


def test_statistics_and_probe_are_read():
    stats = FeatureStats.load("steer/stats")
    stats.check(SAE.from_pretrained("sae/words"), "text")
    assert torch.equal(stats.mean_all, expected("steer.safetensors")["mean_all"])
    want = expected("concepts.safetensors")
    found = ConceptStats.load("concepts.safetensors")
    assert found.concepts == ("red", "blue") and found.steps == 3 and torch.equal(found.mean, want["concepts/mean"])
    said = WorldProbe.load("probe.safetensors")(torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32))
    for attribute, logits in said.items():
        close(logits, want[attribute])


def test_activations_that_were_kept_need_no_host(monkeypatch, written):
    sae, host = load_pair("sae/paired", device="cpu")
    options = {"label": "class", "batch_size": 4, "embed": True, "progress": False}
    call(load_features, host, sae, "shards", cache="fresh", **options)
    (old,), (new,) = (list(Path(f).iterdir()) for f in ("cache", "fresh"))
    assert old.name == new.name  # which host, site and transform: the same for the same
    for file in new.iterdir():  # which tar, where and of what time: this copy's
        shutil.copyfile(next(old.glob(f"{file.name.split('-')[0]}-*")), file)
    monkeypatch.setattr(host, "read", lambda *_: pytest.fail("the host ran"))
    found, want = call(load_features, host, sae, "shards", cache="fresh", **options), expected("features.safetensors")
    assert found.uids == expected("features.json")["uids"]
    assert found.labels.tolist() == expected("features.json")["labels"]
    assert torch.equal(found.x, want["x"]) and torch.equal(found.embed, want["embed"])
    close(found.z.to_dense(), want["codes"])


def test_zero_shot_figures_are_the_same():
    rows = call(zeroshot, "sae/paired", "shards", "zeroshot", label="class", device="cpu", progress=False)["rows"]
    alike(rows, expected("features.json")["zeroshot"])


def test_a_run_goes_on_by_its_own_config(capsys):
    lightning(["fit", "-c", "run/logs/version_0/config.yaml", "--ckpt_path", "last"])
    assert capsys.readouterr().out.count("val/fvu/joint") == 1  # two of three validations were before the kill
    for name in ("sae_weights.safetensors", "mmsae_state.safetensors"):
        got, want = (load_file(Path(f) / name) for f in ("run/sae", "expected/run_sae"))
        assert set(got) == set(want)
        for key in want:
            torch.testing.assert_close(got[key], want[key], atol=1e-5, rtol=1e-5)
    alike(
        read("run/sae/cfg.json")["mmsae"]["training"], read("expected/run_sae/cfg.json")["mmsae"]["training"], rel=1e-4
    )
    alike(read("run/latents.json"), expected("run_latents.json"))


def test_a_sweep_knows_its_points():
    want = read("sweep/sweep.json")
    sweep("pairs", "sweep", k=[2], ratio=[2.0], steps=4, fit_options=want["fit_options"])
    assert read("sweep/sweep.json") == want and not list(Path("sweep").rglob("*.ckpt"))


def test_stages_that_are_done_stay_done(capsys):
    recipe = {"profile": "tiny", "seed": 0, "version": 1}
    stage_log(Path("demo/demo.json"), recipe).run("clip", lambda: pytest.fail("ran again"))
    stages = stages_of(Path("bench"), {"seeds": [0], "damage": 0.4}, False)
    assert stages.run("stages/clip", lambda: pytest.fail("ran again")) == {"accuracy": 0.5}
