"""Names that users copied before the modules moved still lead to the same things, and say the new ones.

``files/names.json`` has the modules of version 0.2.0.dev0 and the names that its documentation used; ``files/yaml`` has
recipes of it that name classes.
"""

import importlib
import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import yaml

from mmsae.moved import NAMES, earlier
from mmsae.sae import SAEEncoder
from mmsae.steering.recipe import load_scorer
from mmsae.training.cli import build_cli, build_job

FILES = Path(__file__).parent / "files"
ROOT = Path(__file__).parents[2]
#: Modules without a successor: nothing used them but their own tests.
GONE = {"mmsae.metrics.evidence_io"}
KNOWN = json.loads((FILES / "names.json").read_text())


pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args", "ignore:mmsae.* is mmsae.* now:FutureWarning")


@pytest.mark.parametrize("module", KNOWN["names"])
def test_documented_names_are_still_found(module):
    found = importlib.import_module(module)
    assert [n for n in KNOWN["names"][module] if not hasattr(found, n)] == []


def test_modules_are_still_found_and_say_where_they_are():
    wrong = {}
    for old in set(KNOWN["modules"]) - GONE:
        if getattr(sys.modules.get(old), "__name__", old) != old:
            del sys.modules[old]  # found by its old name before, and said then
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                new = importlib.import_module(old).__name__
            except ImportError as e:
                wrong[old] = str(e)
                continue
        if new != old and not any(new in str(w.message) and issubclass(w.category, FutureWarning) for w in said):
            wrong[old] = f"is {new}, and nothing says so"
    assert wrong == {}


def test_every_name_in_the_table_leads_somewhere():
    lost = []
    for old in NAMES:
        find = earlier(f"mmsae.{old}")
        for name in " ".join(NAMES[old].values()).split():
            try:
                find(name.partition("=")[0])
            except (ImportError, AttributeError) as e:
                lost.append(f"{old}.{name}: {e}")
    assert lost == []


def callbacks(recipe):
    args = ["-c", str(ROOT / "configs/train/paired_topk_store.yaml"), "-c", str(FILES / "yaml" / recipe)]
    return {type(c).__name__ for c in build_cli(args, run=False).trainer.callbacks}


def test_recipes_with_heads_are_read():
    assert callbacks("test_heads.yaml") >= {"ZeroShotTest", "OODTest"}
    assert callbacks("test_features.yaml") >= {"MonosemanticityTest", "ClassMeansTest"}


@pytest.mark.parametrize("recipe, name", [("pair_weighted", "Filter"), ("weights", "Weights")])
def test_recipes_of_jobs_are_read(recipe, name):
    args = [
        "-c",
        str(FILES / "yaml" / f"{recipe}.yaml"),
        "--model.sae",
        "sae",
        "--model.shards",
        "s",
        "--model.out",
        "o",
    ]
    assert type(build_job(args, run=False).model).__name__ == name


def test_the_recipe_of_the_aligner_is_read():
    job = build_job(["-c", str(FILES / "yaml" / "vl_sae_llava_aligner.yaml")], run=False)
    assert type(job.model).__name__ == "LitAligner" and type(job.model.aligner).__name__ == "Aligner"


def test_scorers_in_a_recipe_are_found():
    named = yaml.safe_load((FILES / "yaml" / "world_words.yaml").read_text())["scorers"]
    assert len(named) == 3 and all(callable(load_scorer(text.partition("=")[2])) for text in named)


@pytest.mark.parametrize("old", ["Backbone", "OpenCLIPBackbone", "LVLMBackbone", "DiffusionBackbone", "load_backbone"])
def test_hosts_were_called_backbones(old):
    new = old.replace("Backbone", "Host").replace("backbone", "host")
    backbones, hosts = importlib.import_module("mmsae.backbones"), importlib.import_module("mmsae.hosts")
    with pytest.warns(FutureWarning, match=f"mmsae.backbones.{old} is mmsae.hosts.{new} now"):
        assert getattr(backbones, old) is getattr(hosts, new)


@pytest.mark.parametrize("module", ["mmsae.sae", "mmsae.sae.encoder"])
def test_the_encoder_of_an_sae_was_called_as_a_host_is(module):
    with pytest.warns(FutureWarning, match=f"{module}.Encoder is mmsae.sae.encoder.SAEEncoder now"):
        assert importlib.import_module(module).Encoder is SAEEncoder
    args = ["-c", str(ROOT / "configs/train/paired_topk_store.yaml"), "--model.sae.encoder"]
    with pytest.warns(FutureWarning, match=f"{module}.Encoder is mmsae.sae.encoder.SAEEncoder now"):
        build_cli([*args, f"{module}.Encoder"], run=False)


def test_an_old_module_leaves_the_new_package_as_it_is():
    code = (
        "import mmsae.backbones.lvlm, mmsae.backbones.diffusion, mmsae.hosts.lvlm.load, mmsae.hosts as h; "
        "assert h.lvlm.__name__ == 'mmsae.hosts.lvlm' and h.diffusion.__name__ == 'mmsae.hosts.diffusion'; "
        "assert mmsae.backbones.lvlm.__name__ == 'mmsae.hosts.lvlm.host'"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
