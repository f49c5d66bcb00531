"""``mmsae predict`` with the recipes of filtering gives the files of the commands, on one rank and on two."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mmsae.cli import COMMANDS, main
from mmsae.recipes import command_recipe, job_of
from mmsae.training.cli import build_job, names_a_module
from tests.helpers.filtering import make_host, make_shards, results, tree

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = sorted((CONFIGS / "filter").glob("*.yaml"))
CPU = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("predict")
    make_host(root)
    make_shards(root / "shards", 48)
    make_shards(root / "clean", 24, share=0)
    return root


def options(root, prefix="--", **more):
    """Options of the command, or of the module."""
    given = {"sae": root / "clip-sae", "shards": root / "shards", "workers": 0, "batch_size": 8, "per_shard": 12}
    dash = (lambda k: k) if "model" in prefix else (lambda k: k.replace("_", "-"))
    return [a for k, v in (given | more).items() for a in (prefix + dash(k), str(v))]


CHOICE = {"select": "match", "keep": 0.25, "balance": 0.8}


@pytest.fixture(scope="module")
def by_command(root):
    more = {"out": root / "command", "target": root / "clean", **CHOICE}
    main(["filter", "-c", str(CONFIGS / "filter/pair_weighted.yaml"), *options(root, **more), "--device", "cpu"])
    return tree(root / "command")


def predict(root, out, *trainer):
    more = {"out": out, "target": root / "clean", **CHOICE}
    return ["predict", "-c", str(CONFIGS / "filter/pair_weighted.yaml"), *options(root, "--model.", **more), *CPU,
            *trainer]  # fmt: skip


def test_predict_filters_as_the_command_does(root, by_command, tmp_path, capsys):
    out = tmp_path / "o"
    main(predict(root, out))
    assert tree(out) == by_command and {"report.html", "scores.parquet", "target.npy"} <= set(by_command)
    assert results(out)["job"]["score"] == "pair_weighted" and results(out)["kept"] == 12
    assert [p.name for p in tmp_path.iterdir()] == ["o"]  # neither work nor logs are left
    main(predict(root, out))
    assert "finished before" in capsys.readouterr().out and tree(out) == by_command


def test_what_a_job_refuses_is_one_sentence(root, tmp_path, capsys):
    with pytest.raises(SystemExit) as e:
        main([*predict(root, tmp_path / "o"), "--model.keep", "1.5"])
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert e.value.code == 2 and said == "mmsae: error: keep is 1.5; it is a share above 0 and at most 1"
    assert not list(tmp_path.iterdir())
    with pytest.raises(SystemExit) as e:
        main([*predict(root, tmp_path / "o"), "--model.kep", "0.5"])
    assert e.value.code == 2 and "kep" in capsys.readouterr().err


def test_a_job_that_was_stopped_goes_on_by_either_way(root, by_command, tmp_path, monkeypatch):
    from mmsae.filtering.scorers.clip import ClipScorer

    class Stopped(BaseException):
        """No error of a shard, without which the job would go on."""

    real, calls = ClipScorer.score, []

    def dies(self, batch):
        calls.append(batch.shards[0])
        if len(calls) == 6:  # the first two measure the time of a batch
            raise Stopped
        return real(self, batch)

    monkeypatch.setattr(ClipScorer, "score", dies)
    with pytest.raises(Stopped):
        main(predict(root, tmp_path / "o"))
    monkeypatch.undo()
    assert list((tmp_path / "o.partial" / "score").glob("*.part"))
    more = {"out": tmp_path / "o", "target": root / "clean", **CHOICE}
    main(["filter", "-c", str(CONFIGS / "filter/pair_weighted.yaml"), *options(root, **more), "--device", "cpu"])
    assert tree(tmp_path / "o") == by_command


@pytest.mark.slow
def test_two_ranks_filter_as_one_process_does(root, by_command, tmp_path):
    command = [sys.executable, "-m", "mmsae.cli", *predict(root, tmp_path / "o", "--trainer.devices", "2")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "world_size" not in done.stderr and "Starting with 2 processes" in done.stdout + done.stderr
    assert tree(tmp_path / "o") == by_command


@pytest.mark.slow
def test_two_ranks_weigh_as_one_process_does(tmp_path):
    from tests.helpers.lvlm_jobs import make_host as make_llava
    from tests.helpers.lvlm_jobs import make_sae, shard

    make_sae(make_llava(tmp_path)).save_pretrained(tmp_path / "sae")
    (tmp_path / "shards").mkdir()
    for i in range(3):
        shard(tmp_path / "shards" / f"{i}.tar", 6, start=6 * i)
    recipe = ["-c", str(CONFIGS / "filter/weights.yaml")]
    given = {"sae": tmp_path / "sae", "shards": tmp_path / "shards", "samples": "null"}
    main(["weights", *recipe, *(a for k, v in given.items() for a in (f"--{k}", str(v))), "--out", str(tmp_path / "a"),
          "--device", "cpu"])  # fmt: skip
    model = [a for k, v in given.items() for a in (f"--model.{k}", str(v))]
    command = [sys.executable, "-m", "mmsae.cli", "predict", *recipe, *model, "--model.out", str(tmp_path / "b"), *CPU]
    done = subprocess.run([*command, "--trainer.devices", "2"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    assert set(tree(tmp_path / "b")) == {
        *("weights.json", "latent_weights.safetensors", "top_tokens.parquet", "gallery.html")
    }


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipes_are_jobs_and_options_of_a_command(path):
    given = [a for k in ("sae", "shards", "out") for a in (f"--model.{k}", "somewhere")]
    cli = build_job(["-c", str(path), *given], run=False)
    assert type(cli.model).__module__ in ("mmsae.filtering.lightning", "mmsae.lvlm.weights.lightning")
    assert cli.trainer.loggers == []
    own = yaml.safe_load(command_recipe(str(path)))
    assert own == job_of(str(path))["init_args"] and own.items() <= vars(cli.config.model.init_args).items()
    assert {"Filter": "filter", "Weights": "weights"}[type(cli.model).__name__] in COMMANDS


def test_which_recipes_name_a_module(tmp_path):
    assert names_a_module(["predict", "-c", str(RECIPES[0])]) and names_a_module(["--model=x.Y"])
    assert names_a_module(["--model", "x.Y"]) and not names_a_module(["--model", "x.yaml", "--model.sae.x", "a.B"])
    plain = str(CONFIGS / "train/llava_tokens.yaml")
    assert not names_a_module(["predict", "-c", plain, "--model.sae.init_args.ratio", "3"])
    assert command_recipe(plain) == plain
    (tmp_path / "broken.yaml").write_text("a: [")
    assert command_recipe(str(tmp_path / "broken.yaml")).endswith("broken.yaml")
