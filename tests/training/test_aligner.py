"""The published VL-SAE for a LLaVA, step by step with its own recipes, on a tiny one; its tap mismatch must be said."""

from pathlib import Path

import pytest
import yaml

from mmsae.cli import main
from mmsae.sae import SAE
from mmsae.sae.aligner import Aligner
from mmsae.training.cli import build_cli, build_job
from tests.helpers.lvlm_jobs import make_host, shard

CONFIGS = Path(__file__).parents[2] / "configs"
ALIGNER, VL_SAE, POPE = (
    str(CONFIGS / name)
    for name in ("train/vl_sae_llava_aligner.yaml", "train/vl_sae_llava.yaml", "eval/pope_vl_sae_llava.yaml")
)
SMALL = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--trainer.max_epochs", "2"]


def test_the_recipes_say_what_was_published():
    lit = build_job(["-c", ALIGNER], run=False)
    assert not lit.model.aligner.normalize and lit.model.aligner.tau == 0.07
    assert (lit.model.lr, lit.model.weight_decay, lit.datamodule.batch_size, lit.trainer.max_epochs) == (
        5e-5, 0.01, 2048, 50
    )  # fmt: skip
    cli = build_cli(["-c", VL_SAE], run=False)
    assert (cli.model.sae.ratio, cli.model.sae.selector.k, cli.datamodule.batch_size) == (8, 256, 512)
    assert cli.datamodule.val_fraction == lit.datamodule.val_fraction == 0.2 and cli.trainer.max_epochs == 10
    pope = yaml.safe_load(Path(POPE).read_text())
    assert pope["site"] == "layers.30:out" and pope["allow_other_site"] is True
    assert "layers.30:in[image_mean]" in Path(ALIGNER).read_text()  # what it was trained at


@pytest.mark.slow
def test_all_steps_and_the_mismatch_that_must_be_said(tmp_path, capsys):
    host = make_host(tmp_path)
    (tmp_path / "shards").mkdir()
    for i, things in enumerate((["red circle", "blue square"], ["green circle", "blue square"])):
        shard(tmp_path / "shards" / f"{i}.tar", 10, start=10 * i, objects=things)
    at = {name: str(tmp_path / name) for name in ("shards", "store", "a", "aligned", "v", "p")}
    sites = '["layers.1:in[image_mean]", "layers.1:in[text_mean]"]'
    name = ["--host", host.hint, "--shards", at["shards"]]
    main(["extract", *name, "--out", at["store"], "--sites", sites, "--workers", "0", "--progress", "false"])
    run = ["--data.store", at["store"], "--data.batch_size", "8", "--trainer.default_root_dir", at["a"]]
    main(["fit", "-c", ALIGNER, *run, *SMALL])
    aligner = f"{at['a']}/aligner"
    assert Aligner.from_pretrained(aligner).d_in == {"image": 32, "text": 32}
    main(["align", "--store", at["store"], "--aligner", aligner, "--out", at["aligned"]])
    run = ["--data.store", at["aligned"], "--data.batch_size", "8", "--trainer.default_root_dir", at["v"]]
    main(["fit", "-c", VL_SAE, *run, *SMALL, "--model.sae.init_args.selector.init_args.k", "16"])
    sae = f"{at['v']}/sae"
    assert str(SAE.from_pretrained(sae).sites["image"]).split(":")[1].startswith("model.language_model.layers.1.in")
    ask = ["pope", "-c", POPE, *name, "--sae", sae, "--aligner", aligner, "--out", at["p"], "--images", "4"]
    ask += ["--site", "layers.1:out", "--settings.max_new_tokens", "2", "--min-objects", "1", "--per-image", "1"]
    ask += ["--strategies", "random", "--device", "cpu", "--progress", "false"]
    with pytest.raises(SystemExit) as e:
        main([*ask, "--allow-other-site", "false"])
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert e.value.code == 2 and "layers.1:in" in said and "layers.1:out" in said and "allow_other_site" in said
    main(ask)
    assert (tmp_path / "p" / "results.json").exists()
