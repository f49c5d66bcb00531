"""``mmsae ood`` end to end on a tiny host: what it writes, its splits, its warnings, and bad input."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from mmsae import load_pair
from mmsae.cli import main
from mmsae.evaluation.features import Features, encode_features, load_features
from mmsae.evaluation.ood.command import ood
from mmsae.evaluation.ood.detectors import KNN
from mmsae.evaluation.ood.fit import FitImages, fit_detectors
from mmsae.evaluation.ood.head import ID, ood_head
from mmsae.evaluation.ood.sets import OODShards, generated, load_sets, split_of
from mmsae.evaluation.options import Detection, EvaluationRun, OODSets
from mmsae.evaluation.rows import find
from mmsae.hosts import load_host
from mmsae.metrics.host.ood import ood_metrics
from mmsae.options import call
from mmsae.types import Codes, InputError
from tests.helpers.evaluation import COLOURS, save_host, save_sae, write_colours, write_noise

QUIET, NO_CONTROL = EvaluationRun(progress=False), Detection(controls=())


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ood")
    host = save_host(folder / "host")
    return {
        "host": host,
        "sae": save_sae(folder / "sae", host),
        "embed": save_sae(folder / "embed", host, "image.embed", ("image", "text")),
        "tokens": save_sae(folder / "tokens", host, "visual.transformer.resblocks.1:out[patches]"),
        "id": write_colours(folder / "id", 240, 0),
        "noise": write_noise(folder / "noise", 50),
        "grey": write_colours(folder / "grey", 50, 3, "g", {"grey": (120, 120, 120), "Red": (200, 60, 60)}, wnid="n1"),
    }


def run(place, out, **more):
    args = {"sae": place["sae"], "id": place["id"], "ood": [f"noise={place['noise']}", f"grey={place['grey']}"]}
    return call(ood, **{**args, "out": str(out), "near": ["grey"], "progress": False, **more})


@pytest.fixture(scope="module")
def done(place, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "run"
    result = run(place, out)
    return result, out, json.loads((out / "results.json").read_text())


def test_every_detector_runs_on_every_feature_with_every_control(done):
    _, out, results = done
    rows = results["rows"]
    assert {r["set"] for r in rows} == {ID, "noise", "grey", "near", "far"}
    assert {r["control"] for r in rows} == {"", "random", "pca", "statistics"}
    have = {(r["features"], r["score"]) for r in rows if not r["control"] and r["set"] == "noise"}
    dense = ("msp", "max_logit", "energy", "vim", "react", "mds", "rmds", "knn")
    native = ("recon", "cap_spearman", "cap_energy", "rarity", "support")
    assert have == {(k, s) for k in ("raw", "code", "recon", "resid") for s in dense} | {("codes", s) for s in native}
    for r in rows:
        assert {"head", "set", "score", "features", "value", "n", "control"} <= set(r) and r["n"] > 0
        if "auroc" in r:
            assert 0 <= r["fpr95_ood_positive"] <= 1 and 0 <= r["fpr95_id_positive"] <= 1 and r["value"] == r["auroc"]
    for file in ("tables.md", "ood.png", "scores.npz"):
        assert (out / file).stat().st_size > 100
    with np.load(out / "scores.npz", allow_pickle=False) as saved:
        assert all(np.isfinite(saved[k]).all() for k in saved.files) and "|raw|mds|id" in saved.files


def test_means_are_unweighted_and_grouped(done):
    rows = done[2]["rows"]
    pick = lambda s: find(rows, set=s, score="mds", features="raw", control="")[0]  # noqa: E731
    assert pick("near")["value"] == pick("grey")["value"] and pick("far")["value"] == pick("noise")["value"]


def test_shared_classes_are_named(done):
    result, _, results = done
    assert result["warnings"] == results["warnings"]
    shared, *edges = result["warnings"]
    assert "grey" in shared and "Red" in shared
    assert len(edges) == 1 and "end of what was tried" in edges[0] and "knn/raw" in edges[0]


def test_images_of_the_tests_that_were_seen_before_are_counted(place, tmp_path):
    few = {
        "scores": ["recon", "knn"],
        "features": ["raw"],
        "controls": [],
        "ood": [f"noise={place['noise']}"],
        "near": [],
    }
    r = run(place, tmp_path / "run", ood_val=[f"v={place['noise']}"], train=place["id"], **few)
    assert [w.split(":")[0] for w in r["warnings"] if "end of what was tried" not in w] == [
        "240 of the 240 ID test images are training or validation images, too (equal uids",
        "50 of the 50 noise images are OOD validation images, too (equal uids",
    ]


def test_detectors_are_fitted_on_all_that_the_sae_has_seen(place, tmp_path):
    """With --val nothing of --train is kept for choosing, and --limit does not cut it."""
    cfg = Path(shutil.copytree(place["sae"], tmp_path / "sae")) / "cfg.json"
    said = json.loads(cfg.read_text())
    said["mmsae"]["training"]["rows"] = {"image": 240}
    cfg.write_text(json.dumps(said))
    few = {"scores": ["recon", "knn"], "features": ["raw"], "controls": [], "sae": str(cfg.parent)}
    more = write_colours(tmp_path / "more", 30, 5, "m")
    run(place, tmp_path / "run", train=place["id"], val=more, id=more, limit=20, fit_limit=1000, **few)
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    n = {k: found["images"][k] for k in ("train", "val", "val_ood", ID, "noise")}
    assert n == {"train": 240, "val": 30, "val_ood": 30, ID: 20, "noise": 20}
    assert found["fitted_on"] == {"recon": 240, "knn": 240}


def test_the_record_says_what_was_done(done):
    results = done[2]
    assert "generated" in results["ood_validation"] and results["images"]["noise"] == 50
    assert sum(results["images"][s] for s in ("train", "val", ID)) == 240
    assert results["chosen"][""]["knn/raw"] and any("Ledoit-Wolf" in n for n in results["notes"])
    assert results["logits"]["raw"] == "linear probe"


def test_noise_is_found_and_colours_are_known(done):
    rows = done[2]["rows"]
    assert find(rows, score="id_accuracy", features="raw", control="")[0]["value"] > 0.95
    assert find(rows, set="noise", score="mds", features="raw", control="")[0]["value"] > 0.9


def test_excluded_classes_are_gone_and_so_is_the_warning(place, tmp_path):
    (tmp_path / "out.txt").write_text("red\n")
    r = run(place, tmp_path / "run", exclude=str(tmp_path / "out.txt"), ood_label="class", scores=["mds", "recon"],
            controls=[], features=["raw"])  # fmt: skip
    assert not any("has classes of the ID set" in w for w in r["warnings"])
    assert find(r["rows"], set="grey", score="mds")[0]["n_ood"] == 25


def test_class_names_make_zero_shot_logits(place, tmp_path):
    (tmp_path / "names.txt").write_text("\n".join(COLOURS))
    for sae, kinds in ((place["embed"], {"raw", "recon", "code"}), (place["sae"], {"embed"})):
        run(place, tmp_path / "run", sae=sae, classes=str(tmp_path / "names.txt"), scores=["msp", "mds", "support"])
        results = json.loads((tmp_path / "run" / "results.json").read_text())
        assert {k for k, v in results["logits"].items() if v == "zero-shot"} == kinds
        assert find(results["rows"], set="noise", score="msp", control="random", features="code")


def test_token_sites_are_pooled_and_their_control_is_read_again(place, tmp_path):
    r = run(place, tmp_path / "run", sae=place["tokens"], scores=["mds", "recon", "rarity"], features=["raw", "code"])
    assert find(r["rows"], control="random", score="recon", set="noise")
    assert json.loads((tmp_path / "run" / "results.json").read_text())["pool"] == "max"


def test_without_labels_detectors_without_classes_run(place, tmp_path):
    r = run(place, tmp_path / "run", label="", controls=["pca"])
    scores = {x["score"] for x in r["rows"]}
    assert {"mds", "knn", "recon", "cap_energy"} <= scores and not {"msp", "rmds", "id_accuracy"} & scores
    assert any("1 class" in n for n in r["notes"])


def test_fewer_samples_than_features_are_said(place, tmp_path):
    r = run(place, tmp_path / "run", limit=40, scores=["mds"], controls=[], features=["raw"])
    assert any("mds on raw: covariance shrunk" in n and "samples for 32 features" in n for n in r["notes"])


def test_empty_codes_give_no_nan(place):
    sae, host = load_pair(place["sae"], device="cpu")
    f = call(load_features, host, sae, place["id"], progress=False)
    dead = f._replace(z=f.z._replace(values=torch.zeros_like(f.z.values)))
    noise = call(load_features, host, sae, place["noise"], label="", progress=False)
    half = torch.arange(f.n) % 2 == 0
    for some in (f, dead):  # codes that are empty in the test only, and everywhere
        setup = FitImages(some.rows(half), some.rows(half), noise.rows(torch.arange(20)))
        scored = ood_head(setup, dead.rows(~half), {"noise": noise}, sae=sae)
        assert all(v.isfinite().all() for sets in scored.conf.values() for v in sets.values())
    assert any("no latent fires" in n for n in scored.notes)


def test_react_does_not_clip_codes_to_nothing(place):
    sae, host = load_pair(place["sae"], device="cpu")
    f = call(load_features, host, sae, place["id"], progress=False)
    noise = call(load_features, host, sae, place["noise"], label="", progress=False)
    few = {"kinds": ("code",), "scores": ("react",)}
    setup = FitImages(f, f, noise, grids={"react": (10.0, 99.0)})  # most entries of a code are 0
    assert fit_detectors(setup, **few).chosen == {"react/code": 99.0}
    none = fit_detectors(setup._replace(grids={"react": (10.0,)}), **few)
    assert not none.detectors and any("react on code is left out" in n for n in none.notes)


def plain(x, y=None, names=()):
    """Features of activations alone."""
    z, n = Codes(x.relu(), None, x.shape[1], "image"), len(x)
    labels = torch.full((n,), -1) if y is None else y
    return Features(x, z, x, labels, list(names), [f"{i:032x}" for i in range(n)], torch.ones(n))


def test_the_number_of_neighbours_stays_a_small_part_of_the_training_images():
    """The validation set lies beyond most of ID, the test set in the middle of all: there the farthest is near."""
    g = torch.Generator().manual_seed(0)
    at = lambda n, a, b: plain(torch.tensor([a, b, 0.0, 0.0]) + 0.15 * torch.randn(n, 4, generator=g))  # noqa: E731
    train, val = (plain(torch.cat([at(54, 1.0, 0.0).x, at(6, 0.0, 1.0).x])) for _ in range(2))
    middle, far = at(60, 0.7, 0.7), at(60, 1.0, -0.3)
    setup = FitImages(train, val, far, grids={"knn": (50, 1, 2, 60)})
    scored = ood_head(setup, val, {"middle": middle}, Detection("auto", ("raw",), ("knn",), ()))
    assert scored.chosen[""]["knn/raw"] <= 6 and scored.rows[0]["auroc"] > 0.9
    all_of_them = lambda x: KNN.fit(train.x).ladder(x, [60])[0]  # noqa: E731
    assert ood_metrics(all_of_them(val.x), all_of_them(middle.x)).auroc < 0.3, "what k = n would give"
    assert ood_metrics(all_of_them(val.x), all_of_them(far.x)).auroc > 0.8, "and why it would be chosen"


def test_settings_are_chosen_without_the_test_sets(place):
    sae, host = load_pair(place["sae"], device="cpu")
    sets = load_sets(host, sae, OODShards(place["id"], {"noise": place["noise"]}), QUIET)
    setup = FitImages(sets.train, sets.val, sets.val_ood)
    a = ood_head(setup, sets.test, sets.ood, NO_CONTROL)
    b = ood_head(setup, sets.val_ood, {"noise": sets.train}, NO_CONTROL)
    assert a.chosen == b.chosen and set(a.chosen[""]) >= {"knn/raw", "react/code", "vim/resid", "cap_spearman/codes"}


def test_splits_are_disjoint_and_the_generated_set_is_of_the_validation_images(place):
    sae, host = load_pair(place["sae"], device="cpu")
    sets = load_sets(host, sae, OODShards(place["id"], {"noise": place["noise"]}), QUIET)
    uids = [set(f.uids) for f in (sets.train, sets.val, sets.test)]
    assert not uids[0] & uids[1] and not uids[1] & uids[2] and not uids[0] & uids[2]
    assert set(sets.val_ood.uids) == uids[1]
    assert split_of("0" * 32, ("train", "val")) in ("train", "val")
    beside = OODSets(train=place["id"])
    shards = OODShards(place["grey"], {"noise": place["noise"]}, beside=beside, classes=[0, 1])
    other = load_sets(host, sae, shards, QUIET)
    assert other.test.n == 50 and other.train.n + other.val.n == 160
    assert any("have no class" in n for n in other.notes)


def test_generated_pictures_keep_their_colours():
    x = torch.rand(6, 3, 33, 32)
    y = generated(x)
    assert y.shape == x.shape and torch.equal(y, generated(x)) and not torch.equal(y, x)
    torch.testing.assert_close(y[::2].flatten(2).sort().values, x[::2].flatten(2).sort().values)
    torch.testing.assert_close(y[1::2].mean((2, 3)), x[1::2].mean((2, 3)), atol=0.05, rtol=0)


def test_features_of_a_store_equal_those_of_the_shards(place):
    sae, host = load_pair(place["sae"], device="cpu")
    f = call(load_features, host, sae, place["id"], progress=False)
    g = encode_features(sae, f.x, f.labels, f.names, f.uids)
    torch.testing.assert_close(g.recon, f.recon, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(g.error, f.error, atol=1e-6, rtol=1e-4)
    assert f.names == ["red", "green", "blue"] and f.n == 240 and f.values == [0, 1, 2]
    assert torch.equal(f.resid, f.x - f.recon)
    part = call(load_features, host, sae, place["id"], limit=30, progress=False)
    assert part.n == 30 and set(part.uids) < set(f.uids)


def test_pooling_tokens(place):
    sae, host = load_pair(place["tokens"], place["host"], device="cpu")
    one = call(load_features, host, sae, place["noise"], label="", limit=7, progress=False)
    mean = call(load_features, host, sae, place["noise"], label="", limit=7, pool="mean", progress=False)
    site = sae.sites["image"]
    from mmsae.shards import expand, unit_batches

    batch = next(unit_batches(expand(place["noise"]), batch_size=100, **host.reading({"image"}))).batch
    rows = host.read(batch, [site])[0]
    z = sae.encode(rows.x, "image").to_dense()
    for i, u in enumerate(one.uids):
        own = z[rows.item == batch.uids.index(u)]
        torch.testing.assert_close(one.z.to_dense()[i], own.amax(0), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(mean.z.to_dense()[i], own.mean(0), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ood": ["noise"]}, "is not NAME=SHARDS"),
        ({"near": ["x"]}, "--near names 'x'"),
        ({"scores": ["odin"]}, "--scores has 'odin'"),
        ({"label": "species"}, "json field 'species'"),
        ({"host": "local-dir:nowhere"}, "does not exist"),
        ({"pool": "sum"}, "pool is 'sum'"),
        ({"fit_limit": 5}, "--fit-limit goes with training shards"),
        ({"val": "x.tar"}, "--val goes with training shards"),
    ],
)
def test_bad_input(place, tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        run(place, tmp_path / "run", **change)
    assert not (tmp_path / "run").exists()


def test_the_command(place, tmp_path, capsys):
    args = ["ood", "--sae", place["sae"], "--host", place["host"], "--id", place["id"], "--out", str(tmp_path / "o")]
    more = ["--ood", f"noise={place['noise']}", f"grey={place['grey']}", "--near", "grey", "--features", "raw", "code"]
    main([*args, *more, "--scores", "mds", "recon", "--limit", "100"])
    said = capsys.readouterr().out
    assert "ood: 2 detectors on raw, code, fitted on " in said and "principal components" in said
    assert said.strip().splitlines()[-1] == str(tmp_path / "o") and "warning: OOD set grey" in said
    with pytest.raises(SystemExit) as e:
        main([*args, "--ood", "noise"])
    assert e.value.code == 2


def test_an_sae_of_another_host_is_refused(place, tmp_path):
    from tests.helpers.encoders import MODELS, save_local

    other = save_local(tmp_path / "other", MODELS["vit"], seed=5)
    with pytest.raises(InputError, match=r"not on host .*--allow-other-site"):
        load_pair(place["sae"], load_host(other), device="cpu")
    few = {"controls": [], "scores": ["recon"], "features": ["raw"]}
    r = run(place, tmp_path / "run", host=other, allow_other_site=True, **few)
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    assert "trained on image:image.pooled" in r["warnings"][0] and r["warnings"] == found["warnings"]
    assert load_host(other).fingerprint[:12] in found["site"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_figures_of_the_cpu(place, tmp_path):
    one, two = (run(place, tmp_path / d, device=d, controls=["random"], scores=["mds", "recon", "msp"])["rows"]
                for d in ("cpu", "cuda"))  # fmt: skip
    for a, b in zip(one, two, strict=True):
        assert all(a[k] == b[k] for k in ("set", "score", "features", "n"))
        assert a["value"] == pytest.approx(b["value"], abs=0.02)
