"""``mmsae fit`` on ranks that share the latents: the run, the checkpoint and the SAE of one device, on any of them."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmsae.cli import main
from mmsae.sae import SAE
from tests.helpers.training import ROOT, make_store, mmsae
from tests.training.test_lit_ranks import figures

RECIPE = str(ROOT / "configs" / "scale" / "topk_million.yaml")
STEPS, LATENTS, K = 24, 160, 2
SMALL = [
    *("--model.sae.init_args.d_sae", LATENTS, "--model.sae.init_args.selector.init_args.k", K),
    *("--model.sae.init_args.precision", "fp32", "--model.dead_after", 200, "--model.optimizer.init_args.lr", 3e-3),
    *("--trainer.accelerator", "cpu", "--trainer.max_steps", STEPS, "--trainer.gradient_clip_val", 0.05),
    *("--trainer.val_check_interval", 8, "--trainer.log_every_n_steps", 4, "--checkpoint.every_n_train_steps", 1),
    *("--data.batch_size", 32, "--data.block", 16, "--data.val_fraction", 0.1),
]
LAST = Path("checkpoints") / "last.ckpt"
ONE = ["--trainer.strategy", "auto", "--trainer.devices", 1]
pytestmark = pytest.mark.slow


def fit(store, run, *args, **kw):
    where = ["--data.store", store, "--trainer.default_root_dir", str(run)]
    return mmsae("fit", *where, *SMALL, *args, recipe=RECIPE, **kw)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A store, a run of one device on it, and one of two that share the latents and were stopped in between."""
    folder = tmp_path_factory.mktemp("latents")
    store = make_store(folder / "store", n=313, rows_per_shard=100)
    for run, options in (("one", ONE), ("two", ["--trainer.devices", 2])):
        done = fit(store, folder / run, *options)
        assert done.returncode == 0, done.stderr
    return store, folder / "one", folder / "two", done


def close(got, want, **kw):
    for name, value in want.items():
        if isinstance(value, dict):
            close(got[name], value, **kw)
        elif isinstance(value, torch.Tensor):
            torch.testing.assert_close(got[name], value, msg=lambda text, name=name: f"{name}: {text}", **kw)


def alike(a, b):
    """Two checkpoints and two SAE folders of runs that did the same."""
    one, two = (torch.load(run / LAST) for run in (a, b))
    assert one["global_step"] == two["global_step"] and one["mmsae"] == two["mmsae"]
    for part in ("state_dict", "optimizer_states"):
        assert [v.shape for v in tensors(two[part])] == [v.shape for v in tensors(one[part])]
    close(two["state_dict"], one["state_dict"], atol=1e-6, rtol=1e-5)
    close(two["optimizer_states"][0]["state"], one["optimizer_states"][0]["state"], atol=1e-4, rtol=1e-3)
    for name in ("sae_weights.safetensors", "mmsae_state.safetensors"):
        close(load_file(b / "sae" / name), load_file(a / "sae" / name), atol=1e-4, rtol=1e-3)


def tensors(part):
    if isinstance(part, torch.Tensor):
        return [part]
    values = part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
    return [t for value in values for t in tensors(value)]


def test_two_ranks_train_what_one_does(trained):
    _, one, two, done = trained
    alike(one, two)
    assert figures(two) == pytest.approx(figures(one), rel=1e-3, abs=1e-4)
    assert done.stdout.count("SAE written to") == 1
    counts = torch.load(two / LAST)["state_dict"]["usage.counts"]
    assert counts.shape == (1, LATENTS) and 0 < int(counts.sum()) <= K * 32 * STEPS
    logged = [line.split(",") for line in (two / "logs/version_0/metrics.csv").read_text().splitlines()]
    column = logged[0].index("train/auxk")
    assert max(float(row[column] or 0) for row in logged[1:]) > 0, "AuxK did nothing"


def test_the_sae_is_like_any_other(trained):
    _, _, two, _ = trained
    sae = SAE.from_pretrained(two / "sae")
    assert sae.d_sae == LATENTS and sae.shard is None
    assert sae.encode(torch.randn(5, 16)).to_dense().shape == (5, LATENTS)


@pytest.mark.long
def test_one_two_and_four_ranks_go_on_with_each_other(trained, tmp_path):
    store, one, *_ = trained
    stops = [(5, ["--trainer.devices", 2]), (11, ONE), (17, ["--trainer.devices", 4]), (-1, ["--trainer.devices", 2])]
    for i, (stop, ranks) in enumerate(stops):
        more = ["--trainer.callbacks+", "tests.helpers.lit.StopAt", "--trainer.callbacks.step", stop]
        done = fit(store, tmp_path / "run", *ranks, *more, *(["--ckpt_path", "last"] if i else []))
        assert (done.returncode == 0) == (stop < 0), done.stderr
        assert torch.load(tmp_path / "run" / LAST)["global_step"] == (stop if stop > 0 else STEPS)
    alike(one, tmp_path / "run")


def test_other_commands_read_its_checkpoint_on_one_device(trained, capsys):
    store, _, two, _ = trained
    args = ["--data.store", store, "--trainer.default_root_dir", str(two), *map(str, [*SMALL, *ONE])]
    main(["validate", "-c", RECIPE, *args, "--ckpt_path", "last"])
    assert "val/fvu/joint" in capsys.readouterr().out


@pytest.mark.long
def test_what_ranks_cannot_share_is_said_in_one_sentence(trained, tmp_path):
    store = trained[0]
    for more, words in (
        (["--trainer.devices", 3], "160 latents cannot be shared evenly among 3 ranks"),
        (["--trainer.devices", 2, "--model.freeze", "decoder"], "freeze 'decoder' does not know ranks that share"),
        (["--trainer.devices", 2, "--model.losses+", "mmsae.sae.NestedTopK"], "loss 'nested_topk' reads whole codes"),
    ):
        done = fit(store, tmp_path / "run", *more)
        assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr, done.stderr
