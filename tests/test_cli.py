"""The command line: help for everything, errors in one sentence with exit code 2, options by either spelling."""

import json
from pathlib import Path

import pytest

from mmsae import InputError, __version__
from mmsae.cli import COMMANDS, LIGHTNING, command_parser, main
from mmsae.training.cli import build_cli
from mmsae.world.shards import write_world

SMOKE = "configs/smoke/paired_topk.yaml"
ROOT = Path(__file__).parents[1]


def fails(capsys, *args):
    """Run a command that must end with exit code 2; returns what it said."""
    with pytest.raises(SystemExit) as stop:
        main(args)
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert said.startswith("mmsae: error: ") and said.count("\n") == 1 and "Traceback" not in said
    return said


@pytest.mark.parametrize("args", [[], ["-h"], ["--help"]])
def test_help_lists_every_command(args, capsys):
    main(args)
    said = capsys.readouterr().out
    assert all(name in said for name in (*LIGHTNING, *COMMANDS))
    assert all(command.summary in said for command in COMMANDS.values())


def test_version(capsys):
    main(["--version"])
    assert capsys.readouterr().out.split() == ["mmsae", __version__]


def test_unknown_command_names_the_known_ones(capsys):
    said = fails(capsys, "trian")
    assert "'trian'" in said and "fit" in said and "extract" in said


def has_help(action):
    return bool((action.help or "").strip()) and action.help.strip() != "%(default)s"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_of_a_command_is_explained(name, capsys):
    parser, fn = command_parser(name)
    without = [a.dest for a in parser._actions if not has_help(a)]
    assert not without, f"the docstring of {fn.__module__}.{fn.__name__} does not explain {without}"
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    said = capsys.readouterr().out
    assert stop.value.code == 0
    for action in parser._actions:
        if action.option_strings and action.dest != "print_config":
            assert "_" not in action.option_strings[0] and action.option_strings[0] in said


def test_every_option_of_fit_is_explained():
    cli = build_cli(["-c", str(ROOT / SMOKE)], run=False)
    own = ("seed_everything", "trainer.", "model.", "data", "checkpoint.", "export.", "latents.")
    actions = [a for a in cli.parser._actions if a.dest.startswith(own)]
    assert {"model.sae", "export.folder", "latents.hub_above"} <= {a.dest for a in actions}
    assert [a.dest for a in actions if not has_help(a)] == []


@pytest.mark.parametrize("name", LIGHTNING)
def test_help_of_lightning_commands(name, capsys):
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    said = capsys.readouterr().out
    assert stop.value.code == 0 and said.startswith(f"usage: mmsae [options] {name}") and "--model.sae" in said


def values(name, *args):
    return command_parser(name)[0].parse_args(list(args)).as_dict()


def test_dashes_underscores_flags_and_yaml_say_the_same(tmp_path):
    base = ("--shards", "s", "--out", "o")
    dashed = values("pretrain-clip", *base, "--image-size", "16", "--overwrite")
    assert dashed["image_size"] == 16 and dashed["overwrite"] is True
    assert dashed == values("pretrain-clip", *base, "--image_size=16", "--overwrite", "true")
    file = tmp_path / "clip.yaml"
    file.write_text(json.dumps({"shards": "s", "out": "o", "image_size": 16, "overwrite": True}))
    from_yaml = values("pretrain-clip", "-c", str(file))
    assert {**from_yaml, "config": None} == dashed


def test_sites_are_a_name_or_a_list():
    base = ("--host", "h", "--shards", "s", "--out", "o", "--sites")
    assert values("extract", *base, "image.embed")["sites"] == "image.embed"
    assert values("extract", *base, "[image.embed, text.pooled]")["sites"] == ["image.embed", "text.pooled"]
    spec = "visual.transformer.resblocks.5:out[patches]"
    assert values("extract", *base, spec)["sites"] == spec


def test_print_config_is_a_config(capsys, tmp_path):
    with pytest.raises(SystemExit):
        main(["extract", "--host", "h", "--shards", "s", "--out", "o", "--batch-size", "7", "--print_config"])
    file = tmp_path / "job.yaml"
    file.write_text(capsys.readouterr().out)
    assert values("extract", "-c", str(file))["batch_size"] == 7


def test_wrong_options_are_named(capsys):
    assert "--hots" in fails(capsys, "extract", "--hots", "x")
    assert "required: host" in fails(capsys, "extract", "--shards", "s", "--out", "o")
    assert "batch_size" in fails(capsys, "extract", "--host", "h", "--shards", "s", "--out", "o", "--batch-size", "x")
    assert "path" in fails(capsys, "info")


def test_wrong_training_options_are_named(capsys, tmp_path):
    root = ("--trainer.default_root_dir", str(tmp_path))
    assert "configs/train/nothing.yaml" in fails(capsys, "fit", "-c", "configs/train/nothing.yaml")
    assert "model.sae" in fails(capsys, "fit")
    assert "max_stepz" in fails(capsys, "fit", "-c", SMOKE, "--trainer.max_stepz", "5")
    assert "'stor'" in fails(capsys, "fit", "-c", "configs/train/topk_store.yaml", "--data.stor", "x")
    said = fails(capsys, "fit", "-c", SMOKE, *root, "--model.sae.init_args.selector.init_args.k", "0")
    assert said == "mmsae: error: k must be at least 1, not 0\n"
    said = fails(capsys, "fit", "-c", SMOKE, *root, "--model.sae.init_args.selector.init_args.k", "999")
    assert "k = 999 does not fit d_sae = 128" in said
    nowhere = str(tmp_path / "nowhere")
    said = fails(capsys, "fit", "-c", "configs/train/paired_topk_store.yaml", *root, "--data.store", nowhere)
    assert nowhere in said
    assert not (tmp_path / "sae").exists()


def test_bad_input_of_a_command_is_one_sentence(capsys, tmp_path):
    out, shards = tmp_path / "out", str(tmp_path / "shards")
    write_world(shards, 2, progress=False)
    assert "No shard matches" in fails(capsys, "pretrain-clip", "--shards", str(tmp_path / "*.tar"), "--out", str(out))
    assert "ViT-B-33" in fails(capsys, "extract", "--host", "ViT-B-33", "--shards", shards, "--out", str(out))
    assert "no checkpoint" in fails(capsys, "convert", "--checkpoint", str(tmp_path / "x.pth"), "--out", str(out))
    assert not out.exists()


def test_a_place_that_cannot_be_written_is_named(capsys, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("mmsae.info.describe", lambda path, verify: (Path(path) / "file" / "x").write_text("a"))
    said = fails(capsys, "info", str(tmp_path))
    assert said == f"mmsae: error: {tmp_path / 'file' / 'x'}: Not a directory\n"


def test_faults_of_the_program_are_not_hidden(monkeypatch, tmp_path):
    def broken(path, verify):
        raise ValueError("a bug")

    monkeypatch.setattr("mmsae.info.describe", broken)
    with pytest.raises(ValueError, match="a bug"):
        main(["info", str(tmp_path)])


def test_an_input_error_under_another_error_is_found(capsys, monkeypatch, tmp_path):
    def wrapped(path, verify):
        try:
            raise InputError("field x is 3, not 4")
        except InputError as e:
            raise RuntimeError("while doing something") from e

    monkeypatch.setattr("mmsae.info.describe", wrapped)
    assert fails(capsys, "info", str(tmp_path)) == "mmsae: error: field x is 3, not 4\n"
