"""Every YAML can be instantiated offline, and a complete recipe says the same as its fragment."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from mmsae.recipes import read_recipe
from mmsae.training.cli import build_cli, build_job, names_a_module
from mmsae.training.lit import LitSAE
from tests.helpers.doc_blocks import run_command

ROOT = Path(__file__).parents[1] / "configs"
COMPLETE = sorted(p for folder in ("train", "smoke", "scale") for p in ROOT.glob(f"{folder}/*.yaml"))
FRAGMENTS = sorted(ROOT.glob("sae/*.yaml"))
DATA = sorted(ROOT.glob("data/*.yaml"))


def test_there_are_recipes_of_every_kind():
    names = {p.stem for p in COMPLETE}
    assert {
        "vl_sae_store",
        "paired_topk_store",
        "vl_sae_openclip_b32",
        "shared_topk_store",
        "dual_topk_store",
        "llava_tokens",
    } <= names
    assert FRAGMENTS and DATA


@pytest.mark.parametrize("path", COMPLETE, ids=lambda p: p.stem)
def test_complete_recipes_instantiate(path, tmp_path):
    args = ["-c", str(path), "--trainer.default_root_dir", str(tmp_path)]
    if names_a_module(args):
        assert build_job(args, run=False).datamodule is not None
        return
    cli = build_cli(args, run=False)
    assert all(isinstance(m, LitSAE) for m in cli.model.each().values()) and cli.datamodule is not None


@pytest.mark.parametrize("sae", FRAGMENTS, ids=lambda p: p.stem)
def test_sae_fragments_combine_with_data(sae, tmp_path):
    cli = build_cli(["-c", str(DATA[0]), "-c", str(sae), "--trainer.default_root_dir", str(tmp_path)], run=False)
    assert isinstance(cli.model, LitSAE) and cli.model.losses


@pytest.mark.parametrize("data", DATA, ids=lambda p: p.stem)
def test_data_fragments_combine_with_an_sae(data, tmp_path):
    cli = build_cli(["-c", str(FRAGMENTS[0]), "-c", str(data), "--trainer.default_root_dir", str(tmp_path)], run=False)
    assert type(cli.datamodule).__module__.startswith("datamodules")


@pytest.mark.parametrize(
    "path", [p for p in FRAGMENTS if (ROOT / "train" / f"{p.stem}_store.yaml").exists()], ids=lambda p: p.stem
)
def test_the_store_recipe_is_its_fragment(path):
    complete = read_recipe(str(ROOT / "train" / f"{path.stem}_store.yaml"))
    assert complete["model"] == yaml.safe_load(path.read_text())["model"]


def test_no_recipe_repeats_what_a_fragment_or_another_recipe_says():
    """Seven lines in a row that two files have in common are a fragment (fragments of SAEs are each a whole method)."""

    def runs(path):
        lines = [x for x in path.read_text().splitlines() if not x.startswith("#")]
        return set(zip(*(lines[i:] for i in range(7)), strict=False))

    seen = {run: path for path in FRAGMENTS for run in runs(path)}
    for path in (
        p for d in ("data", "run", "world", "train", "smoke", "scale") for p in sorted((ROOT / d).glob("*.yaml"))
    ):
        for run in runs(path):
            assert seen.setdefault(run, path) == path, f"{path} repeats lines of {seen[run]}:\n" + "\n".join(run)


def test_overrides_reach_k_and_ratio(tmp_path):
    path = ROOT / "train" / "paired_topk_store.yaml"
    args = ["-c", str(path), "--model.sae.init_args.ratio", "3", "--model.sae.init_args.selector.init_args.k", "5"]
    cli = build_cli([*args, "--trainer.default_root_dir", str(tmp_path)], run=False)
    assert cli.model.sae.ratio == 3 and cli.model.sae.selector.k == 5


def test_the_tokens_of_a_7b_llava_are_streamed_at_their_published_place():
    cli = build_cli(["-c", str(ROOT / "train" / "llava_tokens.yaml")], run=False)
    data = cli.datamodule
    assert data.d_in == 4096 and data.modalities == ("image", "text") and data.text == "question+answer"
    assert cli.model.sae.ratio == 16 and sum(data.mixing.quotas.values()) == 4096


@pytest.mark.parametrize("path", sorted(ROOT.glob("scale/fit*.sbatch")), ids=lambda p: p.stem)  # jobs: tests/jobs
def test_batch_scripts_parse_and_their_commands_would_be_accepted(path, tmp_path, monkeypatch):
    """The shell reads them, Slurm's options are such, and ``mmsae`` takes what they run, with what Slurm would say."""
    assert subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True).stderr == ""
    text = path.read_text()
    options = re.findall(r"^#SBATCH (.+)$", text, re.M)
    assert options and all(re.fullmatch(r"--[a-z-]+(=\S+)?", option) for option in options)
    given = {"STORE": str(tmp_path / "store"), "RUN": str(tmp_path / "run"), "SLURM_JOB_NUM_NODES": "2"}
    lines = re.sub(r"\$(\w+)", lambda m: given.get(m[1], m[0]), text.replace("\\\n", " ")).splitlines()
    commands = [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("srun ")]
    assert commands and all(words[0] == "mmsae" for words in commands)
    monkeypatch.chdir(ROOT.parent)
    for words in commands:
        at = words.index("--ckpt_path")  # of a run, and not of what it is made of
        run_command([*words[:at], *words[at + 2 :]], skipped="needs Slurm")
    nodes, devices = (re.search(rf"--{name}[= ](\d+)", text)[1] for name in ("nodes", "ntasks-per-node"))
    cli = build_cli(
        ["-c", "configs/scale/datacomp1b_pairs.yaml", *words[words.index("--trainer.num_nodes") : at]], run=False
    )
    assert (str(cli.trainer.num_nodes), str(cli.trainer.num_devices)) == (nodes, devices)
