"""``mmsae zeroshot`` and its head: plain CLIP is CLIP, intervals, files of names and templates, bad input."""

import json

import open_clip
import pytest
import torch
from torch.nn.functional import normalize

from mmsae import load_pair
from mmsae.cli import main
from mmsae.evaluation.features import load_features
from mmsae.evaluation.labels import read_classes, read_labels, read_templates
from mmsae.evaluation.options import EvaluationRun
from mmsae.evaluation.rows import find
from mmsae.evaluation.zeroshot.classify import Classifier
from mmsae.evaluation.zeroshot.command import zeroshot
from mmsae.evaluation.zeroshot.head import LabelledScores, text_classes, zero_shot_head
from mmsae.evaluation.zeroshot.report import plot
from mmsae.evaluation.zeroshot.scores import pool_templates, zero_shot_scores
from mmsae.hosts import load_host
from mmsae.metrics.reconstruction import FVU
from mmsae.options import call
from mmsae.sae import random_control
from mmsae.shards import ShardWriter, expand, unit_batches
from mmsae.types import InputError
from tests.helpers.evaluation import COLOURS, save_host, save_sae, write_colours, write_noise


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zero")
    host = save_host(folder / "host")
    (folder / "names.txt").write_text("\n".join(COLOURS) + "\n")
    return {
        "host": host,
        "sae": save_sae(folder / "sae", host, "image.embed", ("image", "text")),
        "image": save_sae(folder / "image", host, "image.embed"),
        "trunk": save_sae(folder / "trunk", host, "visual.transformer.resblocks.1:out[patches]"),
        "shards": write_colours(folder / "data", 150, 0),
        "noise": write_noise(folder / "noise", 20),
        "names": str(folder / "names.txt"),
    }


def run(place, out, **more):
    args = {"sae": place["sae"], "shards": place["shards"], "classes": place["names"], "progress": False}
    return call(zeroshot, **{**args, "out": str(out), **more})


def test_the_classifier_is_open_clips_own(place):
    host = load_host(place["host"])
    templates = ["a {}", "the large {} square on the left", "red {}"]
    mine = normalize(text_classes(host, list(COLOURS), templates), dim=1)
    theirs = open_clip.build_zero_shot_classifier(
        host.model, host.tokenize, list(COLOURS), templates, num_classes_per_batch=None
    )
    torch.testing.assert_close(mine, theirs.T, atol=1e-6, rtol=1e-5)


def test_alpha_zero_is_plain_clip_to_the_bit(place):
    sae, host = load_pair(place["sae"], device="cpu")
    f = call(load_features, host, sae, place["shards"], progress=False)
    w = text_classes(host, list(COLOURS), ["a {}"])
    plain = normalize(f.x, dim=1) @ normalize(w, dim=1).T
    scores = zero_shot_scores(sae, f.x, w)
    assert torch.equal(scores["raw"], plain)
    r = zero_shot_head(LabelledScores(scores, f.labels), LabelledScores(scores, f.labels), alphas=[0.0])
    assert r.alpha == 0 and torch.equal(r.per_class["enhanced"], r.per_class["raw"])


@pytest.mark.parametrize("right", [True, False])
def test_a_perfect_score_is_drawn(tmp_path, right):
    labels = torch.arange(24) % 3
    scores = torch.nn.functional.one_hot(labels if right else (labels + 1) % 3).float()
    found = zero_shot_head(*(LabelledScores({"raw": scores, "code": scores}, labels),) * 2)
    assert {r["value"] for r in find(found.rows, score="top1")} == {float(right)}
    assert all(r["low"] <= r["value"] <= r["high"] for r in found.rows)
    plot(found.rows, found, tmp_path / "zeroshot.png", 1 / 3)
    assert (tmp_path / "zeroshot.png").stat().st_size > 0


def test_the_command_writes_everything(place, tmp_path, capsys):
    args = ["--sae", place["sae"], "--host", place["host"], "--shards", place["shards"], "--out", str(tmp_path / "o")]
    main(["zeroshot", *args, "--classes", place["names"], "--templates", "simple"])
    assert capsys.readouterr().out.strip().splitlines()[-1] == str(tmp_path / "o")
    results = json.loads((tmp_path / "o" / "results.json").read_text())
    rows = results["rows"]
    assert {(r["features"], r["control"]) for r in find(rows, score="top1")} == {
        (k, c) for k in ("raw", "recon", "code", "enhanced") for c in ("", "random")
    }
    for r in find(rows, score="top1") + find(rows, score="balanced"):
        assert r["low"] <= r["value"] <= r["high"] and r["n"] == results["images"]["test"]
    assert find(rows, score="top1", features="raw", control="")[0]["value"] == find(
        rows, score="top1", features="raw", control="random")[0]["value"]  # fmt: skip
    assert len(find(rows, score="explained_variance")) == 2
    assert results["images"]["test"] + results["images"]["tuning"] == 150 and results["chance"] == 1 / 3
    assert len(results["templates"]) == 7 and results["tuning"]["0.0"] is not None
    assert (tmp_path / "o" / "zeroshot.png").stat().st_size > 1000
    assert "| raw | – |" in (tmp_path / "o" / "table.md").read_text()


def test_an_sae_without_texts_and_one_inside_the_tower(place, tmp_path):
    for sae in ("image", "trunk"):
        r = run(place, tmp_path / sae, sae=place[sae])
        assert {x["features"] for x in find(r["rows"], score="top1")} == {"raw", "recon"}
    a, b = (find(run(place, tmp_path / "x", sae=place[s])["rows"], score="top1", features="raw")[0]["value"]
            for s in ("sae", "trunk"))  # fmt: skip
    assert a == b  # the plain host does not depend on where the SAE is


def test_explained_variance_inside_the_tower_is_of_tokens(place, tmp_path):
    sae, host = load_pair(place["trunk"], device="cpu")
    rows = run(place, tmp_path / "o", sae=place["trunk"], tune=place["shards"])["rows"]
    for name, model in (("", sae), ("random", random_control(sae, 0))):
        metric = FVU(sae.sites["image"].width)
        for unit in unit_batches(expand(place["shards"]), batch_size=40, **host.reading({"image"})):
            x = host.read(unit.batch, [sae.sites["image"]])[0].x
            metric.update(model.decode(model.encode(x, "image"), "image"), x)
        (found,) = find(rows, score="explained_variance", control=name)
        assert found["value"] == pytest.approx(1 - metric.compute().item(), rel=1e-4)


def test_the_host_runs_on_from_the_reconstruction(place):
    """A perfect SAE inside the tower changes nothing, one that returns zeros does."""
    sae, host = load_pair(place["trunk"], device="cpu")
    run = EvaluationRun(batch_size=64, progress=False)
    job = Classifier(host, read_classes(place["names"]), torch.zeros(3, 16), run=run)
    plain = call(load_features, host, sae, place["shards"], embed=True, progress=False).embed
    encode, seen = sae.encode, []
    sae.encode = lambda x, m=None: (seen.append(x), encode(x, m))[1]
    sae.decode = lambda z, m=None: seen[-1]
    torch.testing.assert_close(job.through(sae, place["shards"], None, "x"), plain)
    sae.decode = lambda z, m=None: 0 * seen[-1]
    assert not torch.allclose(job.through(sae, place["shards"], None, "x"), plain, atol=1e-2)


def test_alpha_is_chosen_on_images_that_are_not_scored(place, tmp_path):
    other = write_colours(tmp_path / "tune", 30, 5, "t")
    r = run(place, tmp_path / "run", tune=other)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["images"] == {"test": 150, "tuning": 30} and r["rows"]


def test_files_of_names(place, tmp_path):
    known = read_labels(expand(place["shards"]))
    table = tmp_path / "names.json"
    table.write_text(json.dumps({"0": "rouge", "1": "vert", "2": "bleu"}))
    assert read_classes(str(table), known) == (["rouge", "vert", "bleu"], [0, 1, 2])
    table.write_text(json.dumps(["red", "green"]))
    assert read_classes(str(table), known).values == [0, 1]
    by_name = read_labels(expand(place["shards"]), "class")
    assert read_classes(place["names"], by_name).values == list(COLOURS)
    r = run(place, tmp_path / "run", classes="", label="class")
    assert r["warnings"] == []


def test_files_of_templates(tmp_path):
    assert len(read_templates("openai")) == 80 and read_templates("simple")[0] == "itap of a {}."
    (tmp_path / "t.txt").write_text("# ours\na photo of {}\n\n{} again\n")
    assert read_templates(str(tmp_path / "t.txt")) == ["a photo of {}", "{} again"]
    (tmp_path / "t.txt").write_text("a photo\n")
    with pytest.raises(InputError, match=r"t.txt: template 'a photo' has no \{\}"):
        read_templates(str(tmp_path / "t.txt"))


def test_a_class_without_images_is_named(place, tmp_path):
    names = tmp_path / "n.txt"
    names.write_text("red\ngreen\nblue\nzebra\n")
    r = run(place, tmp_path / "run", classes=str(names), control=False)
    assert len(r["warnings"]) == 1 and "zebra" in r["warnings"][0] and "no test image" in r["warnings"][0]
    assert find(r["rows"], score="balanced")[0]["classes"] == 3


def test_images_without_a_label_are_left_out_and_said(place, tmp_path):
    shards = [place["shards"], place["noise"]]  # the noise has no cls
    r = run(place, tmp_path / "run", shards=shards, control=False)
    assert r["warnings"] == ["20 of the 170 images have no label and are left out"]
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert sum(results["images"].values()) == 150


def test_labels_of_tars_of_one_name_stay_apart(place, tmp_path):
    """img2dataset calls the first tar of every set 00000.tar and its first sample 000000000."""
    turned = dict(zip(COLOURS, [*list(COLOURS.values())[1:], next(iter(COLOURS.values()))], strict=True))
    sets = [write_colours(tmp_path / "a", 60, 0), write_colours(tmp_path / "b", 60, 1, colours=turned)]
    known = read_labels(expand(sets))
    assert len(known.value) == 120
    model, host = load_pair(place["image"], device="cpu")
    alone = [call(load_features, host, model, s, batch_size=32, progress=False) for s in sets]
    for cache in ("", tmp_path / "cache", tmp_path / "cache"):  # without one, while it is made, and from it
        f = call(load_features, host, model, sets, batch_size=32, progress=False, cache=cache)
        assert f.labels.tolist() == [c for a in alone for c in a.labels.tolist()]
        assert torch.equal(f.x, torch.cat([a.x for a in alone]))
    again = call(
        load_features, host, model, sets[0], batch_size=32, progress=False, cache=cache
    )  # other uids, same tar
    assert again.uids == alone[0].uids and torch.equal(again.x, alone[0].x)


def test_a_label_that_two_samples_of_one_uid_would_share_is_refused(tmp_path):
    for name, cls in (("a", 0), ("b", 1)):
        with ShardWriter(tmp_path, name) as w:
            w.write("k", {"txt": "t", "cls": cls, "json": {"uid": "ab" * 16}})
    with pytest.raises(InputError, match=r"uid (ab){16} of key k in shard b-000000\.tar was already taken"):
        read_labels(expand(str(tmp_path)))


def test_tuning_on_the_test_images_is_said(place, tmp_path):
    r = run(place, tmp_path / "run", tune=place["shards"], control=False)
    assert r["warnings"] == ["150 of the 150 test images are tuning images, too: alpha has seen them"]


def test_what_templates_would_give_without_the_first_normalisation():
    """spec/probing.md section 13: the longer vector would rule."""
    t = torch.tensor([[1.0, 0], [0.6, 0.8]])
    assert t.mean(0).norm().item() == pytest.approx(0.894427, abs=1e-6)
    longer = torch.tensor([[1.0, 0], [6, 8]])
    torch.testing.assert_close(normalize(longer.mean(0), dim=0), torch.tensor([0.6585, 0.7526]), atol=1e-4, rtol=0)
    torch.testing.assert_close(pool_templates(longer[None])[0], pool_templates(t[None])[0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("red\n", "has 1 class, at least 2 are needed"),
        ("red\nred\n", "'red' 2 times"),
        ("red\ngreen\n", "50 of the 150 images have a label that none of the 2 classes has, such as blue"),
    ],
)
def test_bad_names(place, tmp_path, text, message):
    (tmp_path / "n.txt").write_text(text)
    with pytest.raises(InputError, match=message):
        run(place, tmp_path / "run", classes=str(tmp_path / "n.txt"))
    assert not (tmp_path / "run").exists()


def test_bad_input(place, tmp_path):
    with pytest.raises(InputError, match=r"no sample of .* has cls"):
        run(place, tmp_path / "run", shards=place["noise"])
    with pytest.raises(InputError, match=r"names.txt|cannot be read"):
        run(place, tmp_path / "run", classes=str(tmp_path / "names.txt"))
    with pytest.raises(InputError, match="concept is 'codes'"):
        run(place, tmp_path / "run", concept="codes")
    one = write_colours(tmp_path / "one", 20, 0, "o", {"red": (200, 0, 0)})
    with pytest.raises(InputError, match="have 1 class: 2 are needed"):
        run(place, tmp_path / "run", shards=one, classes="")
    assert "one class" in run(place, tmp_path / "run", shards=one, control=False)["warnings"][1]
