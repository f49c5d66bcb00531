"""``mmsae predict`` with the recipe of evidence gives the bytes of ``mmsae evidence``, on one rank and on two."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mmsae.cli import main
from mmsae.recipes import command_recipe
from mmsae.training.cli import build_job
from tests.helpers.evaluation import save_host, save_sae, write_colours
from tests.helpers.filtering import tree

RECIPE = str(Path(__file__).parents[3] / "configs" / "interpret" / "evidence.yaml")
CPU = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Shards, an SAE, and its evidence by the command."""
    root = tmp_path_factory.mktemp("predict")
    write_colours(root / "shards", 90, seed=3, per_shard=30)
    host = save_host(root / "host")
    save_sae(root / "sae", host, site="image.embed", modalities=("image", "text"), d_sae=40)
    main(["evidence", "-c", RECIPE, *options(root, root / "command"), "--device", "cpu"])
    return root


def options(root, out, prefix="--", join="-"):
    given = {"sae": root / "sae", "shards": root / "shards", "out": out, "workers": 0, "batch_size": 16,
             "min_items": 6, "n_top": 7}  # fmt: skip
    return [a for k, v in given.items() for a in (prefix + k.replace("_", join), str(v))]


def predict(root, out):
    return ["predict", "-c", RECIPE, *options(root, out, "--model.", "_"), *CPU]


def test_predict_collects_what_the_command_does(root, tmp_path, capsys):
    main(predict(root, tmp_path / "o"))
    want = tree(root / "command")
    assert tree(tmp_path / "o") == want and {"evidence.json", "items.parquet", "top.safetensors"} <= set(want)
    assert [p.name for p in tmp_path.iterdir()] == ["o"]  # neither work nor logs are left
    main(predict(root, tmp_path / "o"))
    assert "finished before" in capsys.readouterr().out
    with pytest.raises(SystemExit) as e:
        main([*predict(root, tmp_path / "o"), "--model.n_top", "8"])
    assert e.value.code == 2 and "n_top" in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.slow
def test_two_ranks_collect_as_one_process_does(root, tmp_path):
    command = [sys.executable, "-m", "mmsae.cli", *predict(root, tmp_path / "o"), "--trainer.devices", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert tree(tmp_path / "o") == tree(root / "command")


def test_the_recipe_is_a_job_and_options_of_the_command():
    given = [a for k in ("sae", "shards", "out") for a in (f"--model.{k}", "somewhere")]
    cli = build_job(["-c", RECIPE, *given], run=False)
    own = yaml.safe_load(command_recipe(RECIPE))
    assert own.items() <= vars(cli.config.model.init_args).items() and cli.trainer.loggers == []
