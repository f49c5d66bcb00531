"""``mmsae sweep``: every point trained once, figures from their validations, a table and a picture."""

import csv
import json

import pytest
from PIL import Image

from mmsae import SAE
from mmsae.cli import command_parser, main
from mmsae.training.sweep import draw
from tests.helpers.training import ROOT, make_store

OPTIONS = "--data.batch_size 32 --trainer.accelerator cpu --trainer.enable_progress_bar false"


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("sweep") / "store", n=300)


def sweep(store, out, *args):
    main(["sweep", "--store", str(store), "--out", str(out), "--fit-options", OPTIONS, *map(str, args)])


def test_points_tables_and_picture(store, tmp_path, capsys):
    out = tmp_path / "sweep"
    sweep(store, out, "--k", 2, 4, "--ratio", 2, 3.5, "--steps", 12)
    said = capsys.readouterr().out
    assert "4 trainings of 12 steps" in said and said.endswith(f"{out / 'sweep.csv'}\n{out / 'sweep.png'}\n")
    rows = list(csv.DictReader((out / "sweep.csv").open()))
    assert [(int(r["k"]), float(r["ratio"]), int(r["d_sae"])) for r in rows] == [
        (2, 2, 32), (2, 3.5, 56), (4, 2, 32), (4, 3.5, 56),
    ]  # fmt: skip
    for r in rows:
        assert float(r["l0/image"]) == pytest.approx(int(r["k"]), abs=0.3) and int(r["steps"]) == 12
        assert 0 < float(r["fvu/text"]) < 3 and 0 <= float(r["dead/image"]) <= 1
        sae = SAE.from_pretrained(out / r["run"] / "sae")
        assert (sae.selector.k, sae.d_sae) == (int(r["k"]), int(r["d_sae"]))
    with Image.open(out / "sweep.png") as picture:
        assert picture.format == "PNG" and picture.width > 800

    # more points: the finished ones stay as they are
    before = {p: p.stat().st_mtime_ns for p in out.glob("*/sae/cfg.json")}
    sweep(store, out, "--k", 2, "--ratio", 2, "--seeds", 0, 1, "--steps", 12)
    assert "2 trainings of 12 steps" in (said := capsys.readouterr().out) and "1 of them done before" in said
    assert {p: p.stat().st_mtime_ns for p in before} == before
    points = json.loads((out / "sweep.json").read_text())["points"]
    assert len(points) == 5 and points[0]["fvu/joint"] != points[1]["fvu/joint"] and points[1]["seed"] == 1


def test_seeds_that_agree_are_drawn(tmp_path):
    about = {"ratio": 2.0, "d_sae": 32, "l0/image": 2.0, "dead/image": 0.1, "fvu/image": 0.1}
    rows = [{**about, "k": k, "seed": seed} for k in (2, 4) for seed in range(3)]
    assert sum([0.1] * 3) / 3 > 0.1  # the mean of three equal values lies above all of them
    draw(rows, tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").stat().st_size > 0


def test_a_killed_point_goes_on(store, tmp_path, monkeypatch):
    import mmsae.training.sweep as module

    whole, calls = module.lightning, []

    def killed(args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        whole(args)

    monkeypatch.setattr(module, "lightning", killed)
    with pytest.raises(KeyboardInterrupt):
        sweep(store, tmp_path, "--k", 2, 4, "--ratio", 2, "--steps", 6)
    assert json.loads((tmp_path / "sweep.json").read_text())["points"] == []
    sweep(store, tmp_path, "--k", 2, 4, "--ratio", 2, "--steps", 6)
    assert len(calls) == 3 and len(json.loads((tmp_path / "sweep.json").read_text())["points"]) == 2


def fails(capsys, *args):
    with pytest.raises(SystemExit) as stop:
        sweep(*args)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1
    return said


def test_bad_input(store, tmp_path, capsys):
    assert "there is no such folder" in fails(capsys, tmp_path / "no", tmp_path / "a", "--k", 2, "--ratio", 2)
    assert not (tmp_path / "a").exists()
    said = fails(capsys, store, tmp_path / "b", "--k", 200, "--ratio", 2, "--steps", 4)
    assert "k = 200 does not fit d_sae = 32" in said and not (tmp_path / "b").exists()
    assert "--k must be a whole number, not 'many'" in fails(capsys, store, tmp_path / "b", "--k", "many")
    sweep(store, tmp_path / "b", "--k", 2, "--ratio", 2, "--steps", 4)
    capsys.readouterr()
    said = fails(capsys, store, tmp_path / "b", "--k", 2, "--ratio", 2, "--steps", 5)
    assert "holds a sweep of another job: its steps is 4 there and 5 here; choose another --out" in said
    said = fails(capsys, store, tmp_path / "c", "--recipe", "configs/sae/topk.yaml")
    assert "has no trainer.max_steps: give --steps" in said


def test_the_recipe_of_a_sweep_parses():
    parser, _ = command_parser("sweep")
    values = parser.parse_args(["-c", str(ROOT / "configs/eval/sweep.yaml"), "--store", "x"])
    assert values.k == [8, 16, 32, 64] and values.ratio == [4, 8, 16] and values.seeds == [0, 1, 2]
