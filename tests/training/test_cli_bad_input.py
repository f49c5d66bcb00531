"""Bad input to ``mmsae fit``: exit code 2, one sentence on stderr, and no run folder."""

import os
import resource
import shutil
import subprocess
import sys

import pytest
import torch

from mmsae import SAE, InputError
from mmsae.activations import ActivationStore, write_store
from mmsae.activations.loader import split_items
from mmsae.cli import main
from mmsae.sae import UsageTracker
from mmsae.training.checkpoint import disk_errors
from tests.helpers.training import RECIPE, ROOT, SMALL, make_store

STEPS = ["--trainer.max_steps", "6", "--checkpoint.every_n_train_steps", "2", "--trainer.enable_progress_bar", "false"]

TEXT_ALONE = [
    *("--model.sae.init_args.modalities", "[text]", "--model.sae.init_args.dictionaries", "null"),
    *("--model.losses", '[{"class_path": "mmsae.sae.Reconstruction"}]'),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("bad")


@pytest.fixture(scope="module")
def store(folder):
    return make_store(folder / "store", n=200, rows_per_shard=64)


def call(command, store, root, *args):
    main([command, "-c", RECIPE, "--data.store", str(store), "--trainer.default_root_dir", str(root), *SMALL,
          *STEPS, *map(str, args)])  # fmt: skip


def fails(capsys, *args):
    """Run a command that must end with exit code 2; returns its one sentence."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        call(*args)
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert said.startswith("mmsae: error: ") and said.count("\n") == 1, said
    return said


@pytest.fixture(scope="module")
def trained(store, folder):
    root = folder / "trained"
    call("fit", store, root)
    return root


def test_no_store(tmp_path, capsys):
    said = fails(capsys, "fit", tmp_path / "nowhere", tmp_path / "run")
    assert "nowhere: there is no such folder" in said and not (tmp_path / "run").exists()


def test_a_changed_byte(store, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(store, copy)
    file = copy / "shard-00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-7] ^= 1
    file.write_bytes(data)
    said = fails(capsys, "fit", copy, tmp_path / "run")
    assert "shard-00001.safetensors: content hash is" in said and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--model.sae.init_args.d_in", 12, "the data has image activations of width 16, the SAE takes 12"),
        ("--model.sae.init_args.selector.init_args.k", 49, "k = 49 does not fit d_sae = 48"),
        ("--model.sae.init_args.selector.init_args.k", 0, "k must be at least 1, not 0"),
        ("--model.sae.init_args.selector.init_args.k", "many", "\"k\": Expected a <class 'int'>. Got value: many"),
        ("--model.sae.init_args.normaliser.init_args.scale", "std", "scale must be 'none' or 'rms', not 'std'"),
        ("--data.val_fraction", 1.5, "val_fraction is 1.5"),
        ("--data.stor", "x", "Option 'stor' is not accepted"),
        ("--checkpoint.every_n_train_steps", 0, "every_n_train_steps must be at least 1, not 0"),
        pytest.param(
            *("--trainer.accelerator", "gpu", "gpu"),
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
        ("--ckpt_path", "best", "no best checkpoint"),
        ("--ckpt_path", "hpc", "no checkpoint of a requeued job (hpc_ckpt_N.ckpt) in"),
        ("--trainer.precision", "bf16-true", "precision bf16-true keeps the weights in half precision, where"),
        ("--trainer.precision", "16-true", "use 16-mixed or 32-true"),
        ("--model.sae.init_args.ratio", 0.001, "needs at least 1 latent, not 0 (ratio 0.001 of width 16)"),
        (
            "--data.val_fraction",
            0.001,
            "val_fraction 0.001 of 200 items leaves 0 to validate on, fewer",
        ),
        (
            "--data.val_fraction",
            0.999,
            "leaves 0 to train on, fewer than the number of processes, 1: give",
        ),
        ("--ckpt_path", "nowhere.ckpt", "no checkpoint at nowhere.ckpt"),
        ("--ckpt_path", RECIPE, "paired_topk_store.yaml is damaged, unreadable or not a checkpoint"),
    ],
)
def test_an_option_that_does_not_fit(store, tmp_path, capsys, option, value, message):
    assert message in fails(capsys, "fit", store, tmp_path / "run", option, value)
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_another_recipe(store, trained, tmp_path, capsys):
    last = ["--ckpt_path", trained / "checkpoints" / "last.ckpt"]
    said = fails(capsys, "fit", store, tmp_path / "run", *last, "--model.sae.init_args.ratio", 2)
    assert "sae.encoder.weight has shape (48, 16), this run's (32, 16)" in said
    dictionary = ["--model.sae.init_args.dictionaries", '{"shared": {"class_path": "mmsae.sae.Dictionary"}}']
    said = fails(capsys, "fit", store, tmp_path / "run", *last, *dictionary)
    assert "the checkpoint is of another recipe: only the" in said and "sae.dictionaries" in said
    said = fails(capsys, "fit", store, tmp_path / "run", *last, "--data.batch_size", 16, "--trainer.max_steps", 9)
    assert "the checkpoint was made with batches over all ranks" in said
    assert "of {'image': 32, 'text': 32}, this run has {'image': 16, 'text': 16}" in said
    said = fails(capsys, "fit", store, tmp_path / "run", *last, "--data.val_fraction", 0.2, "--trainer.max_steps", 9)
    assert "the checkpoint was made with split (val_fraction to 1) [0.1, 1.0], this run has [0.2, 1.0]" in said


def test_a_truncated_checkpoint(store, trained, tmp_path, capsys):
    """No run of ours leaves one, but a copy that was cut off is one."""
    whole = (trained / "checkpoints" / "last.ckpt").read_bytes()
    (tmp_path / "checkpoints").mkdir()
    for size in (len(whole) // 2, 0):
        (tmp_path / "checkpoints" / "last.ckpt").write_bytes(whole[:size])
        said = fails(capsys, "fit", store, tmp_path, "--ckpt_path", "last")
        assert "last.ckpt is damaged, unreadable or not a checkpoint" in said
    assert not (tmp_path / "logs").exists() and (tmp_path / "checkpoints" / "last.ckpt").exists()


def test_nothing_to_validate(store, tmp_path, capsys):
    assert "nothing trained to validate: give --ckpt_path" in fails(capsys, "validate", store, tmp_path / "run")
    assert "no checkpoint in" in fails(capsys, "test", store, tmp_path / "run", "--ckpt_path", "last")
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_made(store, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    said = fails(capsys, "fit", store, tmp_path / "file" / "run")
    assert "cannot be written (Not a directory)" in said


def test_no_checkpoint_yet_and_a_used_folder(store, trained, tmp_path, capsys):
    call("fit", store, tmp_path / "run", "--ckpt_path", "last")
    said = capsys.readouterr()
    assert "no checkpoint in" in said.out and "starts at step 0" in said.out and said.err == ""
    first = {n: (tmp_path / "run" / n).read_bytes() for n in ("checkpoints/last.ckpt", "sae/cfg.json")}
    call("fit", store, tmp_path / "run", "--trainer.max_steps", 4)
    said = capsys.readouterr().out
    assert "was used before" in said and "--ckpt_path last" in said
    aside = {n: tmp_path / "run" / n for n in ("checkpoints/earlier.ckpt", "sae-earlier/cfg.json")}
    assert [p.read_bytes() for p in aside.values()] == list(first.values())
    assert (tmp_path / "run" / "sae" / "cfg.json").read_bytes() != first["sae/cfg.json"]


def test_a_finished_run_resumed_writes_the_same(store, trained, capsys):
    weights = trained / "sae" / "sae_weights.safetensors"
    before = weights.read_bytes()
    shutil.rmtree(weights.parent)
    call("fit", store, trained, "--ckpt_path", "last")
    assert weights.read_bytes() == before


def test_a_validated_checkpoint_gives_the_figures_of_its_run(store, trained, capsys):
    import json

    call("validate", store, trained, "--ckpt_path", "last")
    said = capsys.readouterr().out
    assert "val/fvu/joint" in said
    assert json.loads((trained / "sae" / "cfg.json").read_text())["mmsae"]["training"]["steps"] == 6


@pytest.fixture
def small_files():
    """Sets a limit on the size of files, the nearest thing to a full disk that needs no rights."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_a_full_disk_while_a_checkpoint_is_written(store, tmp_path, capsys, small_files):
    call("fit", store, tmp_path / "run")
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    before = last.read_bytes()
    small_files(len(before) // 2)
    said = fails(capsys, "fit", store, tmp_path / "run", "--trainer.max_steps", 12, "--ckpt_path", "last")
    assert f"{last.parent}: no space left to write to" in said and "--ckpt_path last" in said
    assert last.read_bytes() == before and [p.name for p in last.parent.iterdir()] == ["last.ckpt"]


def test_a_full_disk_while_the_sae_is_written(store, tmp_path, capsys, small_files):
    options = ["--trainer.max_steps", 12, "--ckpt_path", "last"]
    call("fit", store, tmp_path / "run")
    last, sae = tmp_path / "run" / "checkpoints" / "last.ckpt", tmp_path / "run" / "sae"
    before = (sae / "sae_weights.safetensors").read_bytes()
    call("fit", store, tmp_path / "run", *options)
    shutil.rmtree(sae)
    small_files(len(before) // 2)
    said = fails(capsys, "fit", store, tmp_path / "run", *options)
    assert f"{sae.parent}: no space left to write to" in said
    assert not sae.exists() and last.exists() and not list(sae.parent.glob(".sae*"))


def test_only_full_disks_are_explained_as_such(tmp_path):
    with pytest.raises(OSError, match="denied"), disk_errors(tmp_path):
        raise PermissionError(13, "denied")
    with pytest.raises(InputError, match="no space left"), disk_errors(tmp_path / "a" / "b"):
        raise OSError(28, os.strerror(28))
    with pytest.raises(InputError, match="wrong"), disk_errors(tmp_path):
        raise InputError("wrong")


def test_unknown_names(capsys, tmp_path):
    for args, message in ((["fitt"], "no command 'fitt'"), (["fit", "-c", "no.yaml"], "no recipe no.yaml")):
        with pytest.raises(SystemExit) as stop:
            main(args)
        said = capsys.readouterr().err
        assert stop.value.code == 2 and message in said and said.count("\n") == 1


def test_help_is_quick_and_complete(capsys):
    code = "import sys; from mmsae.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True)
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--help", "all"])
    said = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    for text in ("--ckpt_path", "Steps between checkpoints", "Loss terms; their sum is minimised", "The best goes to"):
        assert text in said


@pytest.mark.parametrize("big", [False, True], ids=["looked through first", "looked at while read"])
def test_rows_that_are_not_finite(tmp_path, capsys, monkeypatch, big):
    """In a store of one's own; extract drops such rows."""
    x = {m: torch.randn(200, 16) for m in ("image", "text")}
    if big:
        monkeypatch.setattr("mmsae.activations.loader.AUTO_VERIFY_BYTES", 0)
    held = split_items(ActivationStore(write_store(tmp_path / "clean", x)), 0, 0.1)
    for name, wrong in (("training", ~held), ("validation", held)):
        rows = torch.from_numpy(wrong).nonzero()[:3, 0]
        store = write_store(tmp_path / name, x | {"image": x["image"].index_fill(0, rows, float("nan"))})
        said = fails(capsys, "fit", store, tmp_path / f"run-{name}", "--data.batch_size", 256)
        assert f"{name}: 3 of {180 if name == 'training' else 20} image rows in the split" in said
        assert "are not finite (NaN or infinite)" in said and not (tmp_path / f"run-{name}" / "sae").exists()
        call("fit", store, tmp_path / f"text-{name}", "--data.sites", '{"text": "text"}', *TEXT_ALONE)


def test_what_was_killed_before_its_first_checkpoint_is_no_earlier_run(store, tmp_path, capsys):
    call("fit", store, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    shutil.rmtree(tmp_path / "run" / "sae")
    call("fit", store, tmp_path / "run", "--ckpt_path", "last")
    assert "no checkpoint in" in capsys.readouterr().out and not list((tmp_path / "run").glob("*earlier"))
    shutil.rmtree(tmp_path / "run" / "checkpoints")  # with a final SAE it was another run, which came to its end
    call("fit", store, tmp_path / "run", "--ckpt_path", "last")
    assert sorted(p.name for p in (tmp_path / "run").glob("*earlier")) == ["sae-best-earlier", "sae-earlier"]


def test_a_device_without_memory(store, tmp_path, capsys, monkeypatch):
    """Torch's error, where a device would raise it: in a step, in the fit of the normaliser."""

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    with monkeypatch.context() as m:
        m.setattr(UsageTracker, "update", full)
        said = fails(capsys, "fit", store, tmp_path / "step", "--data.resident", "true")
    assert "cpu has no memory left in step 1: lower data.batch_size (now 32), the number of latents" in said
    assert "now 48), data.resident (false leaves" in said and "of rows on disk)" in said
    monkeypatch.setattr(SAE, "fit_normaliser", full)
    said = fails(capsys, "fit", store, tmp_path / "sample")
    assert "no memory left before the first step: lower model.normaliser_rows (now 32,768), data.batch_size" in said
    assert "resident" not in said and not (tmp_path / "sample").exists()
