"""``mmsae evaluate --sae FOLDER``: a card of each SAE of a folder, a table with ranks, what breaks, and going on."""

import csv
import json

import numpy as np
import pytest
import torch
import yaml

from mmsae.cli import main
from mmsae.evaluation.card.card import read_card
from mmsae.evaluation.card.command import evaluate
from mmsae.evaluation.card.many import HEADLINES, is_folder_of_saes, sae_folders, shown, table_of
from mmsae.evaluation.images import HostPass, read_images
from mmsae.evaluation.labels import read_labels
from mmsae.evaluation.rows import find, row
from mmsae.hosts import load_host
from mmsae.interop.visaebench import write
from mmsae.options import call
from mmsae.sae import SAE, AffineEncoder, JumpReLU, TopK
from mmsae.shards import expand
from mmsae.types import InputError
from tests.helpers.evaluation import save_host, write_colours

SITE = "visual.transformer.resblocks.1:out[patches]"
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220)}


def write_sae(folder, d_sae, selector, seed, width=32):
    """An SAE as visaebench writes it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sae = SAE(width, d_sae, modalities=["image"], selector=selector,
                  encoder=AffineEncoder(subtract_decoder_bias=False))  # fmt: skip
    return write(sae, folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("many")
    host = save_host(folder / "host")
    for name, n, seed in (("train", 90, 0), ("val", 45, 1), ("test", 60, 2)):
        write_colours(folder / name, n, seed, name, COLOURS)
    suite = {"title": "colours", "root": str(folder), "host": host, "label": "class", "judge": "json:class",
             "data": {n: n for n in ("train", "val", "test")},
             "heads": {"core": {}, "probes": {}, "monosemantic": {}, "localised": {"images": 5}}}  # fmt: skip
    (folder / "suite.yaml").write_text(yaml.safe_dump(suite))
    width = load_host(host).site(SITE).width
    saes = folder / "saes"
    write_sae(saes / "topk_2x_k8", 2 * width, TopK(8), 0, width)
    write_sae(saes / "topk_4x_k4", 4 * width, TopK(4), 1, width)
    write_sae(saes / "deeper" / "jumprelu_2x", 2 * width, JumpReLU(0.3, 0.1), 2, width)
    torch.save({"other": torch.zeros(3)}, write_sae(saes / "broken", 32, TopK(4), 3, width) / "sae.pt")
    return folder, saes


@pytest.fixture(scope="module")
def scored(place):
    folder, saes = place
    args = ["--sae", str(saes), "--suite", str(folder / "suite.yaml"), "--out", str(folder / "out")]
    with pytest.raises(SystemExit) as end:
        main(["evaluate", *args, "--site", SITE, "--progress", "false"])
    return folder / "out", end.value.code


def test_every_sae_has_a_card_and_a_line_and_the_broken_one_is_named(scored, place, capsys):
    out, code = scored
    assert code == 2
    names = {"topk_2x_k8", "topk_4x_k4", "deeper/jumprelu_2x"}
    with open(out / "table.csv", encoding="utf-8", newline="") as f:
        lines = {line["sae"]: line for line in csv.DictReader(f)}
    assert set(lines) == names and {int(line["latents"]) for line in lines.values()} == {64, 128}
    results = json.loads((out / "results.json").read_text())
    assert set(results["failed"]) == {"broken"} and "encoder.final_block.0.weight" in results["failed"]["broken"]
    for name in names:
        card = read_card(out / "cards" / name)
        own = [{k: v for k, v in r.items() if k != "sae"} for r in results["rows"] if r["sae"] == name]
        assert own == card["rows"] and (out / "cards" / name / "report.html").is_file()
        (fvu,) = find(card["rows"], head="core", set="test", score="fvu", control="", features="recon")
        assert float(lines[name]["core: fvu"]) == fvu["value"]
    page = (out / "report.html").read_text()
    assert "broken was not scored" in page and all(n in page for n in names)
    assert not (out / "cache").exists()


def test_ranks_and_controls_are_those_of_the_figures(scored):
    with open(scored[0] / "table.csv", encoding="utf-8", newline="") as f:
        lines = list(csv.DictReader(f))
    for h in HEADLINES:
        if h.name not in lines[0]:
            continue
        value = np.array([float(line[h.name]) for line in lines])
        order = value if h.best == "min" else -value
        assert [int(line[f"{h.name}, rank"]) for line in lines] == [1 + int((order < o).sum()) for o in order]
        for line in lines:
            card = read_card(scored[0] / "cards" / line["sae"])["rows"]
            random = [r["value"] for r in find(card, head=h.head, score=h.score, features=h.features, control="random")]
            assert line[f"{h.name}, random weights"] == ("" if random in ([], [None]) else str(random[0]))
    assert {"core: fvu", "localised: Moran's I", "probes: 1-sparse"} <= set(lines[0])
    card = read_card(scored[0] / "cards" / lines[0]["sae"])["rows"]
    (raw,) = find(card, head="monosemanticity", score="MS above chance", features="raw", control="")
    (pca,) = find(card, head="core", score="fvu", features="recon", control="pca", set="test")
    assert lines[0]["monosemanticity: MS above chance, raw features"] == str(raw["value"])
    assert lines[0]["core: fvu, components"] == str(pca["value"]) and lines[0]["core: fvu, raw features"] == ""


def test_the_same_command_goes_on(place, scored, monkeypatch):
    """The three cards stay as they are; the broken SAE, mended, gets one."""
    folder, saes = place
    out = scored[0]
    stamps = {p: p.stat().st_mtime_ns for p in (out / "cards").rglob("report.html")}
    write_sae(saes / "broken", 32, TopK(4), 3)
    options = {"site": SITE, "progress": False}
    page = call(evaluate, str(saes), str(folder / "suite.yaml"), str(out), **options)
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps
    assert json.loads((out / "results.json").read_text())["failed"] == {}
    assert page == str(out / "report.html") and (out / "cards" / "broken" / "report.html").is_file()
    write_sae(saes / "broken", 32, TopK(4), 4)  # another SAE of that name is scored anew
    before = read_card(out / "cards" / "broken")
    call(evaluate, str(saes), str(folder / "suite.yaml"), str(out), **options)
    assert read_card(out / "cards" / "broken")["fingerprint"] != before["fingerprint"]
    with pytest.raises(InputError, match="another job: its seed is 0 there and 1 here"):
        call(evaluate, str(saes), str(folder / "suite.yaml"), str(out), seed=1, **options)


def test_figures_are_those_of_visaebench_on_the_rows_that_it_would_standardise(place, scored):
    """Its loader, its Moran's I and its flat FVU of the reconstruction, on the test images."""
    loader = pytest.importorskip("visaebench.hub.loader")
    localization = pytest.importorskip("visaebench.metrics.spatial_coherence.localization")
    folder, saes = place
    host = load_host(str(yaml.safe_load((folder / "suite.yaml").read_text())["host"]), device="cpu")

    def patches(name):
        asked = HostPass(host, host.site(SITE))
        paths = expand(str(folder / name))
        found = read_images(asked, paths, set(read_labels(paths, "", must=False).value))
        return torch.cat([r.x.view(len(r.uids), -1, r.x.shape[1]) for r in found])

    train, test = patches("train"), patches("test")
    mean = train.flatten(0, 1).mean(0)
    std = float((train.flatten(0, 1) - mean).square().mean().sqrt())
    side = round(test.shape[1] ** 0.5)
    for name in ("topk_2x_k8", "deeper/jumprelu_2x"):
        theirs = loader.load_sae(str(saes / name), device="cpu")
        rows = read_card(scored[0] / "cards" / name)["rows"]
        metric = localization.FeatureLocalization(grid_size=(side, side), min_images_per_feature=5)
        (ours,) = find(rows, score="Moran's I", control="")
        assert ours["value"] == pytest.approx(
            metric.compute(theirs, test, mean=mean, std=std, device="cpu").value, abs=1e-4
        )
        x = (test.flatten(0, 1) - mean) / std
        error = (x - theirs.decode(theirs.encode(x))).square().sum()
        (fvu,) = find(rows, head="core", set="test", score="fvu", control="", features="recon")
        assert fvu["value"] == pytest.approx(float(error / (x - x.mean(0)).square().sum()), rel=1e-4)


def test_what_is_a_folder_of_saes(place):
    folder, saes = place
    assert is_folder_of_saes(str(saes)) and is_folder_of_saes(str(saes / "deeper"))
    assert not is_folder_of_saes(str(saes / "topk_2x_k8")) and not is_folder_of_saes(str(folder / "test"))
    assert [p.relative_to(saes).as_posix() for p in sae_folders(saes)] == [
        "broken", "deeper/jumprelu_2x", "topk_2x_k8", "topk_4x_k4"]  # fmt: skip


def test_equal_figures_share_a_rank_and_what_one_lacks_is_in_no_mean(tmp_path):
    def card(fvu, probe, random=0.9):
        rows = [row("core", "test", "fvu", "recon", fvu, 9), row("core", "test", "fvu", "recon", random, 9, "random")]
        return {"d_sae": 8, "rows": [*rows, row("probes", "test", "1-sparse", "code", probe, 9)]}

    lines = table_of({"a": card(0.5, 0.7), "b": card(0.5, float("nan")), "c": card(0.95, 0.8)})
    assert [x["core: fvu, rank"] for x in lines] == [1, 1, 3]
    assert [x["probes: 1-sparse, rank"] for x in lines] == [2, None, 1]
    assert [x["mean rank"] for x in lines] == [1, 1, 3]
    assert [x["better than random"] for x in lines] == ["1 of 1", "1 of 1", "0 of 1"]
    tables = shown(lines)
    assert tables["SAEs"].rows[-1][0] == "c" and "0.950 (3)" in tables["SAEs"].rows[-1]
    assert tables["random weights"].rows[0] == ["a", 0.9] and tables["random weights"].columns == ["sae", "core: fvu"]
    assert tables["components"].rows == [["a"], ["b"], ["c"]]


def test_bad_input(place, tmp_path):
    folder, saes = place
    suite = str(folder / "suite.yaml")
    one = str(saes / "topk_2x_k8")
    with pytest.raises(InputError, match=r"does not say where its host is read: give --site"):
        call(evaluate, one, suite, str(tmp_path / "a"), progress=False)
    with pytest.raises(InputError, match="--controls are those of one SAE"):
        call(evaluate, str(saes), suite, str(tmp_path / "b"), controls=["x=y"], site=SITE, progress=False)
    with pytest.raises(InputError, match=r"image\.embed is \d+ wide and the SAE takes"):
        call(evaluate, one, suite, str(tmp_path / "c"), site="image.embed", progress=False)
    assert not list(tmp_path.iterdir())
