"""``mmsae evaluate`` end to end on a tiny host: rows, controls, what is left out, the page, bad input."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from mmsae import load_pair
from mmsae.cli import main
from mmsae.evaluation.card.card import read_card
from mmsae.evaluation.card.command import evaluate
from mmsae.evaluation.card.page import _summary, ood_tables
from mmsae.evaluation.card.splitting import _side
from mmsae.evaluation.features import Features
from mmsae.evaluation.pooling import TokenMeans, mean_rows, pool_codes
from mmsae.evaluation.rows import row
from mmsae.evaluation.suite import HEADS
from mmsae.metrics.components import Components
from mmsae.metrics.reconstruction import ReconstructionMetrics
from mmsae.metrics.sparsity import sparsity
from mmsae.options import call
from mmsae.sae import SAE, Normaliser, TopK, random_control
from mmsae.shards import expand, unit_batches
from mmsae.types import InputError
from tests.helpers.evaluation import save_host, save_sae, write_colours, write_noise

COLOURS = {"red": (220, 30, 30), "orange": (220, 140, 20), "green": (30, 200, 40), "blue": (30, 40, 220)}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    host = save_host(folder / "host")
    for name, n, seed in (("train", 240, 0), ("val", 80, 1), ("test", 160, 2)):
        write_colours(folder / name, n, seed, name, COLOURS)
    write_noise(folder / "noise", 60)
    (folder / "tree.tsv").write_text("red\twarm\norange\twarm\ngreen\tcool\nblue\tcool\n")
    suite = {
        "title": "colours", "root": str(folder), "label": "class", "judge": "json:class", "templates": "simple",
        "data": {
            "train": "train", "val": "val", "test": "test",
            "dark": {"shards": "test", "change": {"dim": 1.0}, "role": "shift"},
            "same colours": {
                "shards": "test", "label": "cls", "role": "shift", "relabel": {0: "red", 1: "orange", 2: "green"},
            },
            "noise": {"shards": "noise", "label": "", "role": "ood"},
        },
        "trees": {"warmth": "tree.tsv"},
        "others": {"seed 1": "other"},
        "heads": {"shifted": {"sparse": [1], "grid": [0.01, 1, 100]}, **{h: {} for h in HEADS if h != "shifted"}},
    }  # fmt: skip
    (folder / "suite.yaml").write_text(yaml.safe_dump(suite))
    save_sae(folder / "other", host, "image.embed", ("image", "text"), seed=1)
    save_sae(folder / "tokens", host, "visual.transformer.resblocks.1:out[patches]")
    return folder, save_sae(folder / "sae", host, "image.embed", ("image", "text"))


@pytest.fixture(scope="module")
def card(place):
    folder, sae = place
    page = call(evaluate, sae, str(folder / "suite.yaml"), str(folder / "out"), progress=False)
    return Path(page), read_card(folder / "out")


def pick(card, **fields):
    return [r for r in card[1]["rows"] if all(r[k] == v for k, v in fields.items())]


def test_everything_applies_and_every_row_is_whole(card):
    page, results = card
    # one needs more images than these, the other one patches
    assert set(results["skipped"]) == {"error", "localised"} and "one row per image" in results["skipped"]["localised"]
    assert "training images, not 240" in results["skipped"]["error"]
    files = {p.name for p in page.parent.iterdir()}
    assert page.name == "report.html" and files == {"report.html", "results.json", "tables.md"}
    assert {r["head"] for r in results["rows"]} == {
        "core", "recovered", "zeroshot", "monosemanticity", "uniqueness", "pairs", "stability", "probes", "ontology",
        "generalisation", "ood", "absorption", "TPP", "top images", "transfer"}  # fmt: skip
    for r in results["rows"]:
        assert {"head", "set", "score", "features", "value", "n", "control"} <= set(r)
        assert r["n"] > 0 or r["value"] is None
    assert results["images"] == {"train": 240, "val": 80, "test": 160, "dark": 160, "same colours": 120, "noise": 60}


def test_figures_stand_beside_their_controls(card):
    for head, score in (("monosemanticity", "MS"), ("probes", "1-sparse"), ("generalisation", "linear accuracy")):
        kinds = {(r["features"], r["control"]) for r in pick(card, head=head, score=score)}
        assert {("raw", ""), ("code", ""), ("recon", ""), ("resid", ""), ("code", "random"), ("raw", "pca")} <= kinds
    for head in ("core", "recovered", "zeroshot", "pairs", "stability", "ontology", "ood"):
        assert any(r["control"] == "random" for r in pick(card, head=head)), head


def test_figures_are_what_they_should_be(card):
    (fvu,) = pick(card, head="core", set="test", score="fvu", control="")
    assert 0 < fvu["value"] and fvu["low"] < fvu["value"] < fvu["high"] and fvu["n"] == 160
    (l0,) = pick(card, head="core", set="test", score="L0", control="")
    assert l0["value"] <= 8
    (same,) = pick(card, head="generalisation", set="same colours", score="linear accuracy", features="raw", control="")
    (source,) = pick(card, head="generalisation", set="source", score="linear accuracy", features="raw", control="")
    assert (
        source["value"] > 0.9 and same["value"] > 0.9 and same["n"] == 120
    )  # the relabelled set has its classes right
    (far,) = pick(card, head="ood", set="noise", score="mds", features="raw", control="")
    assert far["value"] > 0.9
    (corr,) = pick(card, head="ontology", set="warmth", score="tree correlation", features="raw")
    assert -1 <= corr["value"] <= 1 and 0 < corr["p"] <= 1 and corr["n"] == 6
    assert {r["set"] for r in pick(card, head="stability")} == {"seed 1"}
    (ms,) = pick(card, head="monosemanticity", score="MS", features="code", control="")
    assert sum(ms[k] for k in ("scored", "dead", "constant", "single")) == 64


def test_the_page_has_every_head_and_fetches_nothing(card):
    html = card[0].read_text()
    for title in (
        "Reconstruction and sparsity",
        "Monosemanticity",
        "Ontology",
        "Generalisation under shift",
        "In short",
    ):
        assert title in html
    assert "code (random)" in html and 'src="http' not in html and "<svg" in html


def test_trained_controls_stand_beside_the_sae(place, tmp_path):
    folder, sae = place
    model, other = SAE.from_pretrained(sae), random_control(SAE.from_pretrained(sae), 7)
    frozen, suite = str(other.save_pretrained(tmp_path / "frozen")), str(folder / "suite.yaml")
    options = {"heads": ["core", "recovered"], "progress": False}
    call(evaluate, sae, suite, str(tmp_path / "out"), controls=[f"frozen={frozen}"], **options)
    call(evaluate, frozen, suite, str(tmp_path / "alone"), **options)
    beside, alone = (read_card(tmp_path / name)["rows"] for name in ("out", "alone"))
    own = [r for r in alone if r["control"] == "" and r["features"] != "raw"]
    assert len(own) > 10 and [r for r in beside if r["control"] == "frozen"] == [
        {**r, "control": "frozen"} for r in own
    ]
    html = (tmp_path / "out" / "report.html").read_text()
    assert (
        "code (frozen)" in html
        and "better than frozen" in html
        and read_card(tmp_path / "out")["controls"] == ["frozen"]
    )

    small = SAE(model.d_in, 32, selector=TopK(2))
    small.sites = model.sites
    for argument, said in (
        (f"random={frozen}", "a control cannot be called 'random'"),
        (frozen, "--controls takes NAME=FOLDER"),
        (f"small={small.save_pretrained(tmp_path / 'small')}", "control 'small' has 32 latents, this SAE 64"),
        (f"tokens={folder / 'tokens'}", "control 'tokens' reads .*patches"),
    ):
        with pytest.raises(InputError, match=said):
            call(evaluate, sae, suite, str(tmp_path / "none"), controls=[argument], **options)
    assert not (tmp_path / "none").exists()


@pytest.fixture(scope="module")
def token_card(place):
    folder, _ = place
    heads = [h for h in HEADS if h not in ("recovered", "zeroshot", "pairs", "stable", "error")]
    call(
        evaluate,
        str(folder / "tokens"),
        str(folder / "suite.yaml"),
        str(folder / "of_tokens"),
        heads=heads,
        progress=False,
    )
    return folder, read_card(folder / "of_tokens")


def test_an_sae_on_tokens_has_every_control(token_card):
    card = token_card[1]
    page = (token_card[0] / "of_tokens" / "report.html").read_text()
    assert "latents per token" in page and "latents per image</span>" not in page
    assert card["skipped"] == {} and "reads tokens" in " ".join(card["notes"]["core"])
    for head in ("core", "monosemanticity", "uniqueness", "probes", "ontology", "generalisation", "ood", "absorption",
                 "TPP", "localised", "transfer"):  # fmt: skip
        own = [r for r in card["rows"] if r["head"] == head and r["features"] == "code"]
        sets = {(r["set"], r["score"]) for r in own if not r["control"]}
        assert sets and sets == {(r["set"], r["score"]) for r in own if r["control"] == "random"}, head
    places = {r["control"]: r for r in card["rows"] if r["score"] == "Moran's I"}
    assert set(places) == {"", "random", "shuffled"} and places[""]["n"] > 0
    assert abs(places["shuffled"]["value"] + 1 / 15) < 0.03  # of 16 patches, whatever the values
    (dark,) = {r["n"] for r in card["rows"] if r["set"] == "dark" and r["score"] == "linear accuracy"}
    assert dark == 160
    assert {r["control"] for r in card["rows"] if r["head"] == "ood"} == {"", "random", "pca", "statistics"}
    assert "8 components" in " ".join(card["notes"]["ood"])  # of 64: as many as latents are on per token


@pytest.mark.parametrize("control", ["", "random", "pca"])
def test_figures_of_token_sites_are_those_of_the_validation_over_all_tokens(token_card, control):
    folder, card = token_card
    model, host = load_pair(str(folder / "tokens"), device="cpu")
    read = lambda name: [  # noqa: E731
        host.read(unit.batch, [model.sites["image"]])[0].x
        for unit in unit_batches(expand(str(folder / name)), batch_size=50, **host.reading({"image"}))
    ]
    rows, sae = read("test"), model
    if control == "random":
        sae = random_control(model, 0)
    if control == "pca":
        sae = Components.leading(torch.cat(read("train")), 8)
    metric = ReconstructionMetrics({"image": rows[0].shape[1]})
    for x in rows:
        metric.update({"image": sae.decode(sae.encode(x, "image"), "image")}, {"image": x})
    own = {
        r["score"]: r for r in card["rows"] if r["head"] == "core" and r["control"] == control and r["set"] == "test"
    }
    want, x = metric.compute(), torch.cat(rows)
    assert own["fvu"]["value"] == pytest.approx(want["fvu/image"].item(), rel=1e-5)
    assert own["cosine"]["value"] == pytest.approx(want["cosine/image"].item(), rel=1e-5)
    assert own["fvu"]["low"] < own["fvu"]["value"] < own["fvu"]["high"]
    assert own["fvu"]["n"] == 160 and own["fvu"]["rows"] == len(x) > 160
    z = sae.encode(x, "image")
    recon = sae.decode(z, "image")
    assert own["norm ratio"]["value"] == pytest.approx((recon.norm(dim=1) / x.norm(dim=1)).mean().item(), rel=1e-4)
    assert own["bias ratio"]["value"] == pytest.approx((recon.square().sum() / (x * recon).sum()).item(), rel=1e-4)
    if control != "pca":
        s = sparsity(z)
        for score, figure in (("L0", s.l0), ("dead share", s.dead_fraction), ("dense share", s.hub_fraction)):
            assert own[score]["value"] == pytest.approx(figure.item(), abs=1e-9), score
        assert own["latents per image"]["value"] > own["L0"]["value"]


def test_absorption_on_tokens_is_in_means_that_decode():
    d, k = 6, 2
    sae = SAE({"image": d}, 12, modalities=("image",), selector=TopK(k), normaliser=Normaliser(centre=True))
    rows, item = torch.randn(40, d), torch.arange(40) % 5
    sae.fit_normaliser({"image": rows})
    z = sae.encode(rows, "image")
    pooled, mean, fires = pool_codes(z._replace(info=None), item, 5)
    side = _side(sae, Features(*[None] * 7)._replace(
        z=pooled, tokens=TokenMeans(mean_rows(sae.normaliser(rows, "image")[0], item, 5), mean, fires)))  # fmt: skip
    error = side.x - side.z.to_dense() @ sae.dictionary("image").rows()
    recon = mean_rows(rows - sae.decode(z, "image"), item, 5)
    assert torch.allclose(error, recon, atol=1e-5)
    assert torch.equal(fires.sum(1), torch.bincount(item, (z.values != 0).sum(1)).int())


def test_class_names_that_the_host_does_not_know_are_no_figure(place):
    folder, sae = place
    (folder / "odd.json").write_text(json.dumps({c: f"qq{i}" for i, c in enumerate(COLOURS)}))
    suite = yaml.safe_load((folder / "suite.yaml").read_text()) | {"classes": "odd.json"}
    (folder / "odd.yaml").write_text(yaml.safe_dump(suite))
    heads = ["recovered", "zeroshot"]
    call(evaluate, sae, str(folder / "odd.yaml"), str(folder / "odd"), heads=heads, progress=False)
    skipped = read_card(folder / "odd")["skipped"]
    assert set(skipped) == set(heads) and "no word" in skipped["zeroshot"]


def test_limits_hold_for_texts_too(place):
    folder, sae = place
    from mmsae import load_pair
    from mmsae.evaluation.features import load_features

    model, host = load_pair(sae, device="cpu")
    sides = [
        call(load_features, host, model, str(folder / "test"), limit=40, modality=m, progress=False)
        for m in ("image", "text")
    ]
    assert sides[0].n == sides[1].n == 40 and sides[0].uids == sides[1].uids


def test_what_does_not_apply_is_said(place):
    folder, _ = place
    suite = yaml.safe_load((folder / "suite.yaml").read_text())
    for gone in ("dark", "same colours", "noise"):
        del suite["data"][gone]
    suite |= {
        "trees": {},
        "others": {},
        "heads": ["recovered", "ontology", "shifted", "ood", "stable", "unique", "pairs"],
    }
    (folder / "few.yaml").write_text(yaml.safe_dump(suite))
    args = ["--sae", str(folder / "tokens"), "--suite", str(folder / "few.yaml"), "--out", str(folder / "few")]
    main(["evaluate", *args, "--quick", "--progress", "false"])
    card = read_card(folder / "few")
    assert set(card["skipped"]) == {"recovered", "ontology", "shifted", "ood", "stable", "pairs"}
    assert "trees" in card["skipped"]["ontology"] and "role shift" in card["skipped"]["shifted"]
    assert {r["head"] for r in card["rows"]} == {"uniqueness"} and card["quick"]
    assert "What does not apply" in (folder / "few" / "report.html").read_text()


def test_a_folder_with_something_else_is_left_alone_and_an_old_card_is_replaced(place):
    folder, sae = place
    (folder / "mine").mkdir()
    (folder / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(InputError, match=r"holds notes\.txt"):
        call(evaluate, sae, str(folder / "suite.yaml"), str(folder / "mine"), progress=False)
    for seed in (0, 1):
        call(
            evaluate,
            sae,
            str(folder / "suite.yaml"),
            str(folder / "again"),
            heads=["stable"],
            seed=seed,
            progress=False,
        )
    assert read_card(folder / "again")["seed"] == 1
    assert not list(folder.glob(".again*"))


def test_a_run_that_dies_leaves_the_old_card_and_nothing_else(place, monkeypatch):
    folder, sae = place
    args = (sae, str(folder / "suite.yaml"), str(folder / "dies"))
    call(evaluate, *args, heads=["stable"], seed=5, progress=False)
    monkeypatch.setattr("mmsae.evaluation.card.card.write_card", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call(evaluate, *args, heads=["stable"], seed=6, progress=False)
    assert read_card(folder / "dies")["seed"] == 5 and not list(folder.glob(".dies*"))


def test_lower_absorption_is_better_and_the_energy_score_counts():
    about = {"features": "code", "n": 9}
    rows = [
        row("absorption", "tree", s, value=v, control=c, **about)
        for s in ("absorption", "full absorption")
        for c, v in (("", 0.3), ("random", 0.1))
    ]
    rows += [row("ood", s, "energy", f, v, 9) for s in ("noise", "far") for f, v in (("raw", 0.5), ("code", 0.9))]
    by_head = {h: [r for r in rows if r["head"] == h] for h in ("absorption", "ood")}
    (table,) = _summary(by_head, {}).tables
    assert table.rows == [["Absorption", None, "0 of 2"], ["OOD detection", "1 of 1", None]]


def test_both_rates_stand_on_the_page_by_their_names(card):
    (r,) = pick(card, head="ood", set="noise", score="mds", features="raw", control="")
    made = ood_tables(pick(card, head="ood"))
    tables = {f"{i} {t.caption}": t for i, t in enumerate(made)}
    assert {t.caption.split(",")[0] for t in made} == {"id", "AUROC", "FPR95"}
    assert not any("far" in c for c in tables)  # the mean of one set
    for word, field in (("OOD positive", "fpr95_ood_positive"), ("ID positive", "fpr95_id_positive")):
        own = [t for c, t in tables.items() if f"FPR95, {word}" in c and "noise" in c]
        found = [dict(zip(t.columns, cells, strict=True)) for t in own for cells in t.rows]
        assert [c["mds"] for c in found if c["features"] == "raw" and c.get("mds")] == [f"{r[field]:.3f}"]
    assert "FPR95, ID positive" in card[0].read_text()


def test_images_and_classes_that_sets_share_are_said(place):
    folder, sae = place
    suite = yaml.safe_load((folder / "suite.yaml").read_text())
    suite["data"] = {k: suite["data"][k] for k in ("train", "val")} | {
        "test": "train", "held": {"shards": "test", "role": "ood"}}  # fmt: skip
    suite |= {"heads": {"ood": {"scores": ["recon"], "kinds": ["raw"], "controls": []}}}
    (folder / "shared.yaml").write_text(yaml.safe_dump(suite))
    call(evaluate, sae, str(folder / "shared.yaml"), str(folder / "shared"), progress=False)
    card, page = read_card(folder / "shared"), (folder / "shared" / "report.html").read_text()
    (warning,) = card["warnings"]
    assert warning.startswith("240 of the 240 test images are train images, too (equal uids") and warning in page
    assert "<strong>OOD set held has classes of the ID set</strong>" in page


def test_fine_labels_become_coarse_classes(place):
    folder, sae = place
    suite = yaml.safe_load((folder / "suite.yaml").read_text())
    warmth = {"red": "warm", "orange": "warm", "green": "cool"}  # blue has none
    sets = {k: {"shards": k, "relabel": warmth} if k == "train" else k for k in ("train", "val", "test")}
    sets["again"] = {"shards": "test", "label": "cls", "relabel": {0: "warm", 2: "cool", 3: "cool"}, "role": "shift"}
    sets["noise"] = {"shards": "noise", "label": "", "role": "ood"}
    heads = {"shifted": {"sparse": [1], "kinds": ["raw"], "controls": []}, "probes": {"kinds": ["raw"]}, "ood": {}}
    (folder / "coarse.yaml").write_text(yaml.safe_dump({**suite, "trees": {}, "data": sets, "heads": heads}))
    call(evaluate, sae, str(folder / "coarse.yaml"), str(folder / "coarse"), progress=False)
    card = read_card(folder / "coarse")
    assert card["skipped"] == {} and set(card["more"]["probes"]["one feature"]["raw"]) == {"cool", "warm"}
    assert card["images"] == {"train": 180, "val": 60, "test": 120, "again": 120, "noise": 60}
    said = " ".join(card["warnings"])
    assert "data.train.relabel gives 60 of the 240 images no class" in said
    assert "data.train.relabel, used for test, gives 40 of the 160 images no class" in said
    (again,) = [r for r in card["rows"] if r["set"] == "again" and r["score"] == "linear accuracy"]
    assert again["value"] > 0.6 and again["n"] == 120  # red, green; blue is new


@pytest.mark.parametrize(
    "change",
    [{"trees": {"t": "none.tsv"}}, {"others": {"o": "none"}}, {"templates": "none.txt"}, {"classes": "none.json"},
     {"data": {"train": "train", "test": "test", "sea": {"shards": "none", "role": "ood"}}}],
)  # fmt: skip
def test_files_that_are_not_there_are_found_before_anything_runs(place, change, monkeypatch):
    folder, sae = place
    monkeypatch.setattr("mmsae.load.load_pair", lambda *_: pytest.fail("the host was opened"))
    suite = yaml.safe_load((folder / "suite.yaml").read_text()) | change
    (folder / "lacks.yaml").write_text(yaml.safe_dump(suite))
    with pytest.raises(InputError, match="none"):
        call(evaluate, sae, str(folder / "lacks.yaml"), str(folder / "lacks"), progress=False)


def test_bad_input(place, capsys):
    folder, sae = place
    with pytest.raises(InputError, match="no head nope"):
        call(evaluate, sae, str(folder / "suite.yaml"), str(folder / "x"), heads=["nope"], progress=False)
    suite = yaml.safe_load((folder / "suite.yaml").read_text())
    suite["data"]["same colours"]["relabel"] = {0: "violet"}
    (folder / "bad.yaml").write_text(yaml.safe_dump(suite))
    with pytest.raises(SystemExit, match="2"):
        main(["evaluate", "--sae", sae, "--suite", str(folder / "bad.yaml"), "--out", str(folder / "x"), "--heads",
              "shifted", "--progress", "false"])  # fmt: skip
    assert "gives none of 160 images a class" in capsys.readouterr().err and not (folder / "x").exists()
    one = write_colours(folder / "one", 40, 3, "one", {"red": (220, 30, 30)})
    suite = {"data": {"train": one, "test": one}, "label": "class", "heads": ["probes", "ontology"]}
    (folder / "one.yaml").write_text(yaml.safe_dump(suite | {"trees": {"warmth": str(folder / "tree.tsv")}}))
    call(evaluate, sae, str(folder / "one.yaml"), str(folder / "one_out"), progress=False)
    skipped = json.loads((folder / "one_out" / "results.json").read_text())["skipped"]
    assert set(skipped) == {"probes", "ontology"} and "1 classes" in skipped["ontology"]
