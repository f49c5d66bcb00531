"""Options win over recipes wherever they stand; short and idle runs say so; a run that diverged writes nothing."""

import json

import pytest
import torch

from mmsae.cli import main
from mmsae.recipes import configs_first
from mmsae.sae import SAE, TopK
from mmsae.training import LitSAE


def test_recipes_are_read_before_options_wherever_they_stand(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text("")
    got = configs_first(["--trainer.max_steps", "7", "-c", "r.yaml", "--seed_everything=1", "--config=r.yaml"])
    assert got == ["-c", "r.yaml", "--config", "r.yaml", "--trainer.max_steps", "7", "--seed_everything=1"]


def smoke(tmp_path, *options):
    main(["fit", *options, "-c", "configs/smoke/paired_topk.yaml", "--trainer.default_root_dir", str(tmp_path / "run")])


def test_a_short_run_is_validated_at_its_end(tmp_path, capsys):
    smoke(tmp_path, "--trainer.max_steps", "12", "--trainer.val_check_interval", "1000")
    training = json.loads((tmp_path / "run" / "sae" / "cfg.json").read_text())["mmsae"]["training"]
    assert training["steps"] == 12 and "val/fvu/image" in training["validation"]
    assert (tmp_path / "run" / "sae-best").is_dir()


def test_an_idle_auxk_is_told(tmp_path, capfd):
    smoke(tmp_path, "--trainer.max_steps", "3")
    out = "".join(capfd.readouterr())
    assert "auxk does nothing in this run" in out and "20,000 tokens" in out


def test_a_diverged_run_writes_no_sae(tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        smoke(tmp_path, "--trainer.max_steps", "6", "--model.optimizer.init_args.lr", "1e38")
    assert error.value.code == 2 and "the training diverged" in capsys.readouterr().err
    assert not (tmp_path / "run" / "sae").exists()


def test_a_loaded_sae_gives_plain_tensors_and_can_be_trained_on(tmp_path):
    SAE(4, 8, modalities=["image"], selector=TopK(2)).save_pretrained(tmp_path / "sae")
    sae = SAE.from_pretrained(tmp_path / "sae")
    codes = sae.encode(torch.randn(3, 4).numpy())
    assert codes.to_dense().numpy().shape == (3, 8) and sae.decode(codes).numpy().shape == (3, 4)
    assert all(p.requires_grad for p in LitSAE(sae).sae.parameters())
