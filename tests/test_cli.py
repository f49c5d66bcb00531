"""The command line: help for everything, errors in one sentence with exit code 2, options by either spelling."""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
import timm
import torch
import yaml
from safetensors.torch import save_file

from mmsae import SAE, InputError, __version__, cli
from mmsae.cli import COMMANDS, LIGHTNING, SHARDS, _prepare, _takes, command_parser, main
from mmsae.sae import TopK
from mmsae.training.cli import build_cli
from mmsae.training.help import OPTIONS
from mmsae.world.generator.shards import write_world

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


def test_the_package_is_the_command():
    done = subprocess.run([sys.executable, "-m", "mmsae", "--version"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout == f"mmsae {__version__}\n"


def test_unknown_command_names_the_known_ones(capsys):
    said = fails(capsys, "trian")
    assert "'trian'" in said and "fit" in said and "extract" in said


def test_tracebacks_on_request(capsys, monkeypatch):
    monkeypatch.setenv("MMSAE_TRACEBACK", "0")
    plain = fails(capsys, "info", "nothing/here/at/all")
    monkeypatch.setenv("MMSAE_TRACEBACK", "1")
    with pytest.raises(SystemExit) as stop:
        main(["info", "nothing/here/at/all"])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.endswith(plain) and "Traceback (most recent call last)" in said
    assert "InputError" in said and "in main" in said
    main(["--help"])
    assert "MMSAE_TRACEBACK=1" in capsys.readouterr().out


def test_an_option_with_a_new_name_says_it(capsys):
    assert "it is --allow-other-site now" in fails(capsys, "pope", "--allow-tap-mismatch", "true")


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
        main([name, "--help", "all"])
    said = capsys.readouterr().out
    assert stop.value.code == 0 and said.startswith(f"usage: mmsae [options] {name}") and "--model.sae" in said
    main([name, "--help"])
    short = capsys.readouterr().out
    assert short.startswith(f"usage: mmsae {name} -c RECIPE") and f"mmsae {name} --help all" in short
    assert "configs/" in short and f"example:\n  mmsae {name} -c configs/" in short


def test_short_help_of_training_names_options_that_there_are():
    known = {"--config", "--ckpt_path", "--data.store", "--data.shards", "--data.batch_size", "--print_config"}
    known |= set(build_cli(["-c", str(ROOT / SMOKE)], run=False).parser._option_string_actions)
    given = {o.split()[0] for part in OPTIONS.values() for name in part for o in name.split(", ") if o[:2] == "--"}
    free = ("--model.sae.init_args.", "--axes.")  # whatever the parts have
    assert not {o for o in given if o not in known and not o.startswith(free)}
    sae = inspect.signature(SAE).parameters
    assert {"ratio", "selector"} <= set(sae) and "k" in inspect.signature(TopK).parameters


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


def options_of_shards():
    """Every option of every command that takes one value or several."""
    for name in COMMANDS:
        for action in command_parser(name)[0]._actions:
            if _takes(action) == "either" and action.option_strings:
                yield name, action.option_strings[0], action.dest


def _one_of(action):
    """A value that an option takes."""
    kind = getattr(action, "_typehint", None)
    return get_args(kind)[0] if get_origin(kind) is Literal else "x"


@pytest.mark.parametrize(("name", "option", "dest"), list(options_of_shards()))
def test_several_values_stand_side_by_side_are_repeated_or_a_list(name, option, dest):
    parser = command_parser(name)[0]
    needed = [a for a in parser._actions if a.required and a.dest != dest]
    rest = [w for a in needed for w in (*a.option_strings[:1], _one_of(a))]

    def get(*args):
        return parser.parse_args([*rest, *args]).as_dict()[dest]

    want = ["p q/[1].tar", "layers.0:out[image]", "c{0,1}"]
    assert get(option, *want) == want
    assert get(option, want[0], f"{option}={want[1]}", option, want[2]) == want
    assert get(option, want[0], "--seed", "3", option, *want[1:]) == want if "seed" in parser.get_defaults() else True
    assert get(option, f"[{', '.join(want)}]") == want
    assert get(option, json.dumps(want)) == want
    assert [get(option, w) for w in want] == want  # one is not a list
    assert get(option, "[a]/x[1]") == "[a]/x[1]"


def test_several_values_of_yaml_and_of_lists_of_one_type(tmp_path):
    file = tmp_path / "job.yaml"
    for shards in ("a.tar", ["a.tar", "b.tar"]):
        file.write_text(json.dumps({"host": "h", "out": "o", "shards": shards, "sites": ["x:out[image]"]}))
        assert values("extract", "-c", str(file))["shards"] == shards
        assert values("extract", "-c", str(file), "--shards", "c", "d")["shards"] == ["c", "d"]
    base = ("--sae", "s", "--id", "i", "--out", "o")
    want = ["a=x,y", "b={0,1}.tar"]
    assert (
        values("ood", *base, "--ood", *want)["ood"] == values("ood", *base, "--ood", want[0], "--ood", want[1])["ood"]
    )
    assert values("patches", "--sae", "s", "--shards", "x", "--out", "o", "--keep", "[.5, .25]")["keep"] == [0.5, 0.25]


def test_shards_of_training_take_several_values_too(capsys, tmp_path):
    import datamodules
    from mmsae.filtering.lightning import Filter

    owners = [*(getattr(datamodules, n) for n in datamodules.__all__), Filter]
    given = [(n, str(p.annotation)) for o in owners for n, p in inspect.signature(o).parameters.items()]
    assert {n for n, said in given if "str | list[str]" in said} == set(SHARDS)
    recipe = ["fit", "-c", SMOKE, "--trainer.default_root_dir", str(tmp_path), "--trainer.max_steps", "1"]
    recipe += ["--data", "datamodules.ImageTextDataModule", "--data.val", "v", "--print_config"]
    for given in (["a", "b"], ["a", "--data.train", "b"], ["[a, b]"]):
        with pytest.raises(SystemExit):
            main([*recipe[:-1], "--data.train", *given, "--print_config"])
        said = yaml.safe_load(capsys.readouterr().out)
        assert said["data"]["init_args"]["train"] == ["a", "b"] and said["data"]["init_args"]["val"] == "v"
    recipe[recipe.index("--data") + 1] = "datamodules.StreamingActivations"
    with pytest.raises(SystemExit):
        main([*recipe[:-3], "--data.host", "h", "--data.shards=a", "--data.val_shards", "v", "w", "--print_config"])
    said = yaml.safe_load(capsys.readouterr().out)["data"]["init_args"]
    assert said["val_shards"] == ["v", "w"] and said["shards"] == "a"


def test_shards_of_several_values_are_all_read(capsys, tmp_path):
    for name, n in (("a", 3), ("b", 4)):
        write_world(str(tmp_path / name), n, progress=False)
    tars = sorted(map(str, tmp_path.rglob("*.tar")))
    main(["info", *tars, "--as-json"])
    assert json.loads(capsys.readouterr().out)["samples"] == 7


def test_print_config_is_a_config(capsys, tmp_path):
    with pytest.raises(SystemExit):
        main(["extract", "--host", "h", "--shards", "s", "--out", "o", "--batch-size", "7", "--print_config"])
    file = tmp_path / "job.yaml"
    file.write_text(capsys.readouterr().out)
    assert values("extract", "-c", str(file))["batch_size"] == 7


def test_wrong_options_are_named(capsys):
    assert "--hots" in fails(capsys, "extract", "--hots", "x")
    assert "required: host" in fails(capsys, "extract", "--shards", "s", "--out", "o")
    assert "path" in fails(capsys, "info")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--batch-size", "x"], "--batch-size must be a whole number, not 'x'"),
        (["--workers", "2.5"], "--workers must be a whole number, not '2.5'"),
        (["--fault-limit", "few"], "--fault-limit must be a number, not 'few'"),
        (["--precision", "fp99"], "--precision must be one of fp32, bf16, fp16, not 'fp99'"),
    ],
)
def test_a_value_of_another_type_is_said_with_its_option(capsys, given, said):
    said += " (mmsae extract --help explains every option)"
    assert fails(capsys, "extract", "--host", "h", "--shards", "s", "--out", "o", *given) == f"mmsae: error: {said}\n"


def test_a_number_of_several_and_one_of_training_are_said_with_their_option(capsys):
    said = fails(capsys, "sweep", "--recipe", "r", "--store", "s", "--out", "o", "--k", "4", "many")
    assert "--k must be a whole number, not 'many'" in said
    said = fails(capsys, "fit", "-c", SMOKE, "--trainer.max_steps", "many")
    assert "--trainer.max_steps must be a whole number, not 'many'" in said


@pytest.mark.parametrize(
    "command",
    [["ood", "--id", "i", "--ood", "a=b"], ["zeroshot", "--shards", "s"], ["evaluate", "--suite", "s"]],
    ids=lambda c: c[0],
)
def test_a_cache_that_is_a_file_is_named_before_anything_is_read(capsys, tmp_path, command):
    file = tmp_path / "file"
    file.write_text("")
    for cache in (file, file / "below"):
        said = fails(capsys, *command, "--sae", "nowhere", "--out", str(tmp_path / "out"), "--cache", str(cache))
        assert said == f"mmsae: error: --cache is {cache}, but {file} is a file and no folder\n"


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
    monkeypatch.setattr("mmsae.info.describe", lambda path, *_: (Path(path) / "file" / "x").write_text("a"))
    said = fails(capsys, "info", str(tmp_path))
    assert said == f"mmsae: error: {tmp_path / 'file' / 'x'}: Not a directory\n"


def test_faults_of_the_program_are_not_hidden(monkeypatch, tmp_path):
    def broken(path, *_):
        raise ValueError("a bug")

    monkeypatch.setattr("mmsae.info.describe", broken)
    with pytest.raises(ValueError, match="a bug"):
        main(["info", str(tmp_path)])


def test_an_input_error_under_another_error_is_found(capsys, monkeypatch, tmp_path):
    def wrapped(path, *_):
        try:
            raise InputError("field x is 3, not 4")
        except InputError as e:
            raise RuntimeError("while doing something") from e

    monkeypatch.setattr("mmsae.info.describe", wrapped)
    assert fails(capsys, "info", str(tmp_path)) == "mmsae: error: field x is 3, not 4\n"


def test_threads_of_every_command(monkeypatch, tmp_path, capsys):
    before = torch.get_num_threads()
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(name, "9")
    try:
        fails(capsys, "info", str(tmp_path), "--threads", "3")
        assert torch.get_num_threads() == 3 and os.environ["OMP_NUM_THREADS"] == "3"
        build_cli(["-c", str(ROOT / SMOKE), "--threads", "2"], run=False)
        assert torch.get_num_threads() == 2 and os.environ["MKL_NUM_THREADS"] == "2"
        assert "threads is 0" in fails(capsys, "info", str(tmp_path), "--threads", "0")
    finally:
        torch.set_num_threads(before)
    for name in COMMANDS:
        assert "--threads" in command_parser(name)[0]._option_string_actions, name


def test_options_of_a_host_become_part_of_its_name(tmp_path, monkeypatch):
    from mmsae.activations import ActivationStore

    model = timm.create_model("test_vit", num_classes=0)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"architecture": "test_vit", "num_classes": 0}')
    write_world(tmp_path / "shards", 4, progress=False)
    shards, host = str(tmp_path / "shards" / "world-*.tar"), f"timm:local-dir:{tmp_path}"
    options = ["--workers", "0", "--progress", "false", "--sites", "blocks.0:out[cls]"]
    base = ["extract", "--host", host, "--shards", shards, *options]
    main([*base, "--out", str(tmp_path / "a"), "--host-options.img_size", "32"])
    main([*base, "--out", str(tmp_path / "b"), "--host-options", '{"img_size": 32}'])
    sites = [ActivationStore(tmp_path / name).spec.sites for name in "ab"]
    assert sites[0] == sites[1] and {s.hint for s in sites[0].values()} == {f'{host} {{"img_size": 32}}'}
    args = values("zeroshot", "--sae", "s", "--shards", "x", "--out", "o", "--allow-random-weights")
    _prepare(args, ("host",))
    assert args["host"] == ' {"allow_random": true}' and "host_options" not in args and "threads" not in args


def test_our_warnings_are_one_sentence_and_those_of_libraries_keep_their_place():
    code = """
import warnings
from mmsae.cli import main
from mmsae.errors import OldName, Warned
for _ in range(2):
    try:
        main(["status", "nowhere"])
    except SystemExit:
        pass
warnings.warn("images may break", Warned)
warnings.warn("a is b now", OldName)
warnings.warn("of a library", UserWarning)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    lines = done.stderr.splitlines()
    assert lines[2:4] == ["mmsae: warning: images may break", "mmsae: warning: a is b now"]
    assert lines[4].endswith("UserWarning: of a library") and "<string>:" in lines[4]


@pytest.mark.parametrize(
    ("command", "values", "ways"),
    [
        ("explore", ["runs/e"], "another program may hold the memory of the device"),
        (
            "zeroshot",
            ["--sae=a", "--shards=b", "--classes=c", "--out=d"],
            "lower --batch-size (now its default) or give",
        ),
        ("pope", ["--host=a", "--shards=b", "--out=c", "--batch-size=3"], "lower --batch-size (now 3) or give"),
        (
            "zeroshot",
            ["--sae=a", "--shards=b", "--classes=c", "--out=d", "--precision=bf16", "--device=cpu"],
            "its default)\n",
        ),
    ],
)
@pytest.mark.parametrize("error", ["device", "host"])
def test_no_memory_left_is_one_sentence_with_the_options_that_help(command, values, ways, error, capsys, monkeypatch):
    def full(*args, **kwargs):
        if error == "device":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried")

    monkeypatch.setattr(cli, "call", full)
    assert ways in fails(capsys, command, *values)
    monkeypatch.setattr(cli, "call", lambda *given, **more: [][0])
    with pytest.raises(IndexError):  # any other fault stays one of the program
        main([command, *values])
