"""``mmsae sweep``: every point trained once, figures from their validations, a table and a picture."""

import csv
import json

import pytest
import torch
from PIL import Image

from mmsae import SAE
from mmsae.activations import write_store
from mmsae.activations.spec import name_sites
from mmsae.cli import command_parser, main
from mmsae.training.checkpoint import AtomicCheckpointIO
from mmsae.types import Site
from tests.helpers.training import RECIPE, ROOT, make_store

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
    assert f"2 trainings of 12 steps in {out}, 1 to do in 1 passes" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in before} == before
    points = json.loads((out / "sweep.json").read_text())["points"]
    assert len(points) == 5 and points[0]["fvu/joint"] != points[1]["fvu/joint"] and points[1]["seed"] == 1


def test_a_point_is_what_a_run_of_its_own_gives(store, tmp_path):
    sweep(store, tmp_path / "sweep", "--k", 2, 4, "--ratio", 2, "--seeds", 1, "--steps", 8)
    sweep(store, tmp_path / "two", "--k", 2, 4, "--ratio", 2, "--seeds", 1, "--steps", 8, "--at-once", 1)
    one = f"--model.sae.init_args.ratio 2 --model.sae.init_args.selector.init_args.k 4 --seed_everything 1 {OPTIONS}"
    one = [*one.split(), "--trainer.max_steps", "8", "--trainer.val_check_interval", "8", "--data.store", str(store)]
    main(["fit", "-c", RECIPE, *one, "--trainer.default_root_dir", str(tmp_path / "one")])
    for name in ("sae/sae_weights.safetensors", "sae/cfg.json", "latents.json"):
        whole = (tmp_path / "one" / name).read_bytes()
        assert all((tmp_path / s / "k4-ratio2-seed1" / name).read_bytes() == whole for s in ("sweep", "two")), name
    left = {p.name for p in (tmp_path / "sweep").iterdir()}
    assert left == {"k2-ratio2-seed1", "k4-ratio2-seed1", "logs", "sweep.csv", "sweep.json", "sweep.png"}


def test_a_killed_pass_goes_on_before_points_that_are_added(store, tmp_path, capsys):
    options = f"{OPTIONS} --checkpoint.every_n_train_steps 2 --trainer.callbacks+ tests.helpers.lit.StopAt"
    args = ["--store", str(store), "--out", str(tmp_path), "--k", "2", "4", "--ratio", "2", "--steps", "6"]
    with pytest.raises(SystemExit):
        main(["sweep", *args, "--fit-options", f"{options} --trainer.callbacks.step 5"])
    assert json.loads((tmp_path / "sweep.json").read_text())["points"] == []
    # what stopped it is part of the job's options: as if it had been killed without them
    job = json.loads((tmp_path / "sweep.json").read_text())
    (tmp_path / "sweep.json").write_text(json.dumps(job | {"fit_options": OPTIONS}))
    capsys.readouterr()
    sweep(store, tmp_path, "--k", 3, "--ratio", 2, "--steps", 6)
    said = capsys.readouterr().out
    assert "1 trainings of 6 steps" in said and "3 to do in 2 passes" in said and "going on after step 4" in said
    points = json.loads((tmp_path / "sweep.json").read_text())["points"]
    assert [p["k"] for p in points] == [2, 3, 4] and not (tmp_path / "checkpoints").exists()


def test_a_point_that_diverges_leaves_the_others(store, tmp_path, capsys, monkeypatch):
    import mmsae.training.sweep as module

    given = module.lightning

    def mad(args):
        at = args.index("--members") + 1
        members = json.loads(args[at])
        members["k4-ratio2-seed0"]["lr"] = 1e30
        given([*args[:at], json.dumps(members), *args[at + 1 :]])

    monkeypatch.setattr(module, "lightning", mad)
    with pytest.raises(SystemExit) as stop:
        main(["sweep", "--store", str(store), "--out", str(tmp_path), "--k", "2", "4", "--ratio", "2", "--steps", "9",
              "--fit-options", f"{OPTIONS} --trainer.log_every_n_steps 3"])  # fmt: skip
    assert stop.value.code == 2 and "1 of 2 members have no result: k4-ratio2-seed0" in capsys.readouterr().err
    rows = list(csv.DictReader((tmp_path / "sweep.csv").open()))
    assert [r["run"] for r in rows] == ["k2-ratio2-seed0", "k4-ratio2-seed0"]
    assert (
        rows[0]["stopped"] == "" and rows[1]["stopped"].startswith("stopped in step 3") and rows[1]["fvu/joint"] == ""
    )

    # again, without its fault: its row is of the figures that it has now
    monkeypatch.setattr(module, "lightning", given)
    options = f"{OPTIONS} --trainer.log_every_n_steps 3"
    main(["sweep", "--store", str(store), "--out", str(tmp_path), "--k", "4", "--ratio", "2", "--steps", "9",
          "--fit-options", options])  # fmt: skip
    rows = list(csv.DictReader((tmp_path / "sweep.csv").open()))
    assert "stopped" not in rows[0] and [r["steps"] for r in rows] == ["9", "9"]


@pytest.mark.parametrize("at_once", [3, 1])
def test_a_point_that_diverges_after_a_checkpoint(store, tmp_path, capsys, monkeypatch, at_once):
    """Others go on, in its pass and in those after it, and no checkpoint or SAE holds what is not finite as its own."""
    kept, given = [], AtomicCheckpointIO.save_checkpoint

    def save(self, checkpoint, path, storage_options=None):
        given(self, checkpoint, path)
        kept.append((checkpoint["global_step"], checkpoint["mmsae"]["stopped"], list(checkpoint["mmsae"]["members"])))

    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", save)
    name = "k4-ratio2-seed0"
    options = f"{OPTIONS} --trainer.log_every_n_steps 2 --checkpoint.every_n_train_steps 3 "
    options += (
        f"--trainer.callbacks+ tests.helpers.lit.Spoil --trainer.callbacks.member {name} --trainer.callbacks.step 4"
    )
    with pytest.raises(SystemExit) as stop:
        main(["sweep", "--store", str(store), "--out", str(tmp_path), "--k", "2", "4", "6", "--ratio", "2",
              "--steps", "9", "--at-once", str(at_once), "--fit-options", options])  # fmt: skip
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1 and f"{name} stopped in step 6: the training diverged" in said
    rows = list(csv.DictReader((tmp_path / "sweep.csv").open()))
    assert [(r["run"], r["steps"]) for r in rows] == [
        ("k2-ratio2-seed0", "9"), (name, ""), ("k6-ratio2-seed0", "9")
    ]  # fmt: skip
    assert rows[1]["stopped"].startswith("stopped in step 6") and rows[1]["last_good"] == "3"
    assert [p.name for p in tmp_path.glob(f"{name}/sae*")] == ["sae-last-good"]
    about = json.loads((tmp_path / name / "sae-last-good/cfg.json").read_text())["mmsae"]["training"]
    assert about["steps"] == 3 and about["diverged"] == rows[1]["stopped"]
    assert SAE.from_pretrained(tmp_path / name / "sae-last-good").encoder.weight.isfinite().all()
    own = [(step, name in stopped) for step, stopped, members in kept if name in members]
    assert own[0] == (3, False) and all(gone for step, gone in own[1:])
    assert (len(own) == 1) == (at_once == 1)  # alone, the last good one is not written over


def test_sites_are_an_axis(tmp_path, capsys):
    """Killed under way, it goes on at the same sites; a point more is a pass of its own, as ever."""
    g = torch.Generator().manual_seed(0)
    sites = name_sites([Site("h" * 32, f"blocks.{i}", tokens="cls", width=8 + 4 * i) for i in range(3)])
    x = {name: torch.randn(300, site.width, generator=g) for name, site in sites.items()}
    held, out = write_store(tmp_path / "store", x, sites=sites), tmp_path / "sweep"
    common = ["--store", str(held), "--out", str(out), "--recipe", "configs/train/topk_store.yaml", "--k", "2"]
    common += ["--ratio", "2", "--steps", "6"]
    killed = f"{OPTIONS} --checkpoint.every_n_train_steps 2 --trainer.callbacks+ tests.helpers.lit.StopAt"
    with pytest.raises(SystemExit):
        args = ["--sites", "blocks.0", "blocks.2:out[cls]", "--fit-options", f"{killed} --trainer.callbacks.step 5"]
        main(["sweep", *common, *args])
    job = json.loads((out / "sweep.json").read_text())
    assert job["under_way"] == {
        "k2-ratio2-seed0-blocks.0": "blocks.0", "k2-ratio2-seed0-blocks.2_out_cls": "blocks.2:out[cls]",
    }  # fmt: skip
    (out / "sweep.json").write_text(json.dumps(job | {"fit_options": OPTIONS}))
    capsys.readouterr()
    main(["sweep", *common, "--sites", "blocks.1", "--fit-options", OPTIONS])
    said = capsys.readouterr().out
    assert "3 to do in 2 passes" in said and "going on after step 4" in said
    rows = list(csv.DictReader((out / "sweep.csv").open()))
    assert [(r["sites"], int(r["d_sae"])) for r in rows] == [
        ("blocks.0:out[cls]", 16), ("blocks.1:out[cls]", 24), ("blocks.2:out[cls]", 32),
    ]  # fmt: skip
    for r in rows:
        assert SAE.from_pretrained(out / r["run"] / "sae").sites["image"].spec == r["sites"]


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
