"""Where a checkpoint and an option disagree, one sentence says so: neither wins silently."""

import json

import pytest
import torch

from mmsae.cli import main
from mmsae.training import Schedule
from tests.helpers.training import RECIPE, SMALL, make_store

SAE = "--model.sae.init_args."
TERM = '[{"class_path": "mmsae.sae.Reconstruction", "init_args": {"reduction": "%s"}}]'


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A store, and a run of 6 steps on it."""
    folder = tmp_path_factory.mktemp("options")
    make_store(folder / "store", n=200)
    fit(folder, folder / "run")
    return folder


def fit(folder, root, *args, command="fit"):
    options = ["--data.store", folder / "store", "--trainer.default_root_dir", root, *SMALL, "--trainer.max_steps", 6]
    quiet = ["--trainer.enable_progress_bar", "false"]
    main([command, "-c", RECIPE, *map(str, [*options, *quiet, *args])])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([SAE + "selector.init_args.k", 5], "sae.selector.k is 3 in the checkpoint, 5 in this run"),
        ([SAE + "selector.init_args.strict", "true"], "sae.selector.strict is False in the checkpoint, True in"),
        ([SAE + "normaliser.init_args.unit_in", "false"], "sae.normaliser.unit_in is True"),
        (["--model.optimizer.init_args.lr", 0.5], "optimizer.lr is 0.001 in the checkpoint, 0.5 in this run"),
        (["--model.optimizer.init_args.betas", "[0.5, 0.9]"], "optimizer.betas is (0.9, 0.999) in the checkpoint"),
        (["--model.optimizer", "torch.optim.AdamW"], "optimizer.name is Adam in the checkpoint, AdamW in this run"),
        (["--model.scheduler.init_args.kind", "cosine"], "scheduler.options.kind is linear in the checkpoint"),
        (["--model.scheduler.init_args.decay", 0.1], "scheduler.options.decay is 0.3 in the checkpoint, 0.1"),
        (
            ["--model.losses", TERM % "mse"],
            "losses.0.reconstruction.reduction is fvu in the checkpoint, mse in",
        ),
        (
            ["--model.losses", TERM % "fvu"],
            "losses.terms is ['reconstruction', 'auxk', 'code_cosine'] in the",
        ),
        (["--model.freeze", "decoder"], "freeze is nothing in the checkpoint, decoder in this run"),
        (["--model.dead_after", 700], "dead_after is 500 in the checkpoint, 700 in this run"),
        (["--trainer.gradient_clip_val", 1.0], "trainer.gradient_clip_val is None in the checkpoint, 1.0 in"),
        (["--seed_everything", 7], "seed is 0 in the checkpoint, 7 in this run"),
    ],
)
def test_an_option_that_disagrees_with_the_checkpoint_is_refused(place, capsys, options, said):
    before = sorted(place.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        fit(place, place / "run", "--trainer.max_steps", 9, *options, "--ckpt_path", "last")
    err = capsys.readouterr().err
    assert stop.value.code == 2 and said in err and err.count("\n") == 1, err
    assert "give the checkpoint's value, or no --ckpt_path" in err and sorted(place.rglob("*")) == before


def test_a_checkpoint_that_holds_no_options_still_tells_its_k(place, tmp_path, capsys):
    """Those of earlier versions; where no step is left, nothing else would say that k is not what was asked for."""
    saved = torch.load(place / "run/checkpoints/last.ckpt", weights_only=True)
    del saved["mmsae"]
    torch.save(saved, tmp_path / "old.ckpt")
    with pytest.raises(SystemExit):
        fit(place, tmp_path / "run", SAE + "selector.init_args.k", 5, "--ckpt_path", tmp_path / "old.ckpt")
    assert "sae.selector.k is 3 in the checkpoint, 5 in this run" in capsys.readouterr().err


def test_a_measurement_needs_the_same_sae_and_no_more(place, capsys):
    last = ["--ckpt_path", place / "run" / "checkpoints" / "last.ckpt"]
    fit(place, place / "elsewhere", "--model.optimizer.init_args.lr", 0.5, *last, command="validate")
    with pytest.raises(SystemExit):
        fit(place, place / "elsewhere", SAE + "selector.init_args.k", 5, *last, command="validate")
    assert "sae.selector.k is 3 in the checkpoint, 5 in this run: it is another model" in capsys.readouterr().err


def test_a_longer_training_is_said_and_follows_its_own_schedule(place, tmp_path, capsys):
    last = ["--ckpt_path", place / "run" / "checkpoints" / "last.ckpt", "--trainer.max_steps", 12]
    fit(place, tmp_path / "run", *last)
    said = capsys.readouterr().out
    assert "going on after step 6; the training has 12 steps now, not 6: schedule and ramps follow that" in said
    assert json.loads((tmp_path / "run/sae/cfg.json").read_text())["mmsae"]["training"]["steps"] == 12
    saved = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert saved["mmsae"]["total_steps"] == 12 and saved["mmsae"]["recipe"]["sae.selector.k"] == 3


def test_the_rate_of_a_longer_training_is_that_of_its_own_length():
    def schedule(total, steps):
        optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        made = Schedule(optimizer, warmup=0, decay=0.5)
        made.set_total_steps(total)
        for _ in range(steps):
            optimizer.step()
            made.step()
        return optimizer, made

    optimizer, short = schedule(10, 8)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.4)  # 2 of the last 5 steps are left
    again, longer = schedule(40, 0)
    again.load_state_dict(optimizer.state_dict())
    longer.load_state_dict(short.state_dict())
    assert longer.total_steps == 40 and again.param_groups[0]["lr"] == 1.0


def test_a_checkpoint_that_does_not_know_its_options_is_said(place, tmp_path, capsys):
    saved = torch.load(place / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    del saved["mmsae"]
    torch.save(saved, tmp_path / "old.ckpt")
    fit(place, tmp_path / "run", "--ckpt_path", tmp_path / "old.ckpt", "--trainer.max_steps", 8)
    assert "the checkpoint of an earlier version does not say its options" in capsys.readouterr().out
