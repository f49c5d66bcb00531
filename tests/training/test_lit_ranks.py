"""Two processes over gloo train and validate as one does: nothing hangs, nothing is counted twice."""

import csv
import io
import re
from pathlib import Path

import pytest
import torch
import yaml

from datamodules import CachedActivations
from mmsae.activations import StoreLoader
from mmsae.cli import main
from mmsae.recipes import read_recipe
from mmsae.sae import Normaliser, fit_rows
from tests.helpers.training import RECIPE, ROOT, SMALL, fit, make_store, mmsae

TWO = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.accelerator", "cpu"]
DUMP = ["--trainer.callbacks+", "tests.helpers.rank_dump.DumpRanks"]
STEPS = 9
OPTIONS = ["--data.batch_size", 17, "--data.block", 16, "--trainer.max_steps", STEPS, "--trainer.val_check_interval", 4]
pytestmark = pytest.mark.slow


def ranks(run):
    return [torch.load(run / f"rank-{r}.pt") for r in range(2)]


def figures(run):
    """The validation figures of the newest log."""
    newest = max((run / "logs").glob("version_*"), key=lambda p: int(p.name.split("_")[1]))
    rows = [r for r in csv.DictReader((newest / "metrics.csv").open()) if r.get("val/fvu/joint")]
    return {k: float(v) for k, v in rows[-1].items() if k.startswith("val/") and v}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A store whose rows, blocks and files divide unevenly, and a run of two ranks on it."""
    folder = tmp_path_factory.mktemp("ranks")
    store, run = make_store(folder / "store", n=313, rows_per_shard=100), folder / "run"
    done = fit(store, run, *OPTIONS, *TWO, *DUMP)
    assert done.returncode == 0, done.stderr
    return store, run, done


def test_ranks_end_with_the_same_state(trained):
    a, b = ranks(trained[1])
    assert a["world"] == 2 and a["state"].keys() == b["state"].keys()
    assert [k for k in a["state"] if not torch.equal(a["state"][k], b["state"][k])] == []


def test_rows_on_the_device_change_nothing(trained, tmp_path):
    done = fit(trained[0], tmp_path / "run", *OPTIONS, *TWO, *DUMP, "--data.resident", "true")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("moved there once (data.resident false leaves them on disk)") == 1
    for a, b in zip(ranks(trained[1]), ranks(tmp_path / "run"), strict=True):
        assert [k for k in a["state"] if not torch.equal(a["state"][k], b["state"][k])] == []


def test_counters_count_the_tokens_of_both_ranks(trained):
    state = ranks(trained[1])[0]["state"]
    assert state["usage.tokens"].tolist() == [STEPS * 2 * 17] * 2
    assert (state["usage.counts"].sum(1) <= 3 * state["usage.tokens"]).all()
    assert (state["usage.counts"].sum(1) > 2.5 * state["usage.tokens"]).all()  # k is 3
    assert ((state["usage.counts"] == 0) == (state["usage.since"] == state["usage.tokens"][:, None])).all()


def test_the_normaliser_knows_the_rows_of_both_ranks(trained):
    store, run, _ = trained
    data = CachedActivations(store, batch_size=17, block=16)
    data.setup()
    loaders = [StoreLoader(data.activations, 17, split=(0.1, 1.0), rank=r, world=2, block=16) for r in range(2)]
    parts = [fit_rows(loader, 32_768) for loader in loaders]
    normaliser = Normaliser(unit_in=True, centre=True, unit_out=True)
    normaliser.build({"image": 16, "text": 16})
    normaliser.fit({m: torch.cat([p[m] for p in parts]) for m in ("image", "text")})
    state = ranks(run)[0]["state"]
    for name, value in normaliser.state_dict().items():
        torch.testing.assert_close(state[f"sae.normaliser.{name}"], value, atol=1e-6, rtol=1e-6)


def test_every_parameter_gets_gradients_without_looking_for_unused_ones(trained):
    for rank in ranks(trained[1]):
        assert rank["without_grad"] == [] and rank["find_unused"] is False


def test_one_rank_writes_and_speaks(trained):
    _, run, done = trained
    names = sorted(str(p.relative_to(run)) for p in run.rglob("*") if p.is_file())
    assert len([n for n in names if n.endswith("metrics.csv")]) == 1
    assert len([n for n in names if "tfevents" in n]) == 1
    assert {"sae/sae_weights.safetensors", "sae-best/cfg.json", "latents.json", "checkpoints/last.ckpt"} <= set(names)
    assert done.stdout.count("SAE written to") == 1 and done.stdout.count("dead latents") == 1
    assert len(re.findall("val/fvu/joint", done.stdout)) == 2  # validations after steps 4 and 8
    assert "Warning" not in done.stderr and "recommended" not in done.stderr


def rows_of(run):
    """``{step: uids of its batch, over all ranks}``, and the state with which every rank began at a step."""
    rows, began = {}, {}
    for path in sorted(run.glob("rows-*.pt")):
        _, step, rank = path.stem.split("-")
        found = torch.load(path)
        began[int(step), int(rank)] = found
        for at, uids in found["rows"].items():
            rows[at] = rows.get(at, []) + uids
    return rows, began


def test_two_one_and_two_ranks_train_as_one(trained, tmp_path):
    """A run that is stopped on two ranks goes on on one, then on two again: the same batches, and the same SAE."""
    store, total, last = trained[0], 20, Path("checkpoints") / "last.ckpt"
    options = ["--data.block", 16, "--trainer.max_steps", total, "--data.uids", "true", "--model.dead_after", 10**6]
    options += ["--checkpoint.every_n_train_steps", 1, "--trainer.callbacks+", "tests.helpers.rank_dump.DumpRows"]
    done = fit(store, tmp_path / "one", *options, "--data.batch_size", 34)
    assert done.returncode == 0, done.stderr
    saved, options = [], [*options, "--data.batch_size", 17]
    for stop, ranks_now in ((5, TWO), (13, []), (-1, TWO)):
        end = ["--trainer.callbacks.stop", stop, *(["--ckpt_path", "last"] if saved else [])]
        done = fit(store, tmp_path / "run", *options, *end, *ranks_now)
        assert (done.returncode == 0) == (stop < 0), done.stderr
        said = "the training was begun on 2 ranks: batches keep their 34 rows over all ranks, 34 on each of 1"
        assert done.stdout.count(said) + done.stderr.count(said) == (stop == 13)
        saved.append(torch.load(tmp_path / "run" / last))
    (want, _), (rows, began) = rows_of(tmp_path / "one"), rows_of(tmp_path / "run")
    assert sorted(rows) == list(range(total)) and rows == want
    epoch = 282 // 34
    for lo in range(0, total, epoch):
        seen = [uid for step in range(lo, min(lo + epoch, total)) for uid in rows[step]]
        assert len(set(seen)) == len(seen)
    # every rank goes on with what the checkpoint holds, whatever wrote it
    for before, step, ranks_then in ((saved[0], 5, 1), (saved[1], 13, 2)):
        for rank in range(ranks_then):
            now = began[step, rank]
            assert all(torch.equal(v, before["state_dict"][k]) for k, v in now["state"].items())
            torch.testing.assert_close(
                now["optimizer"]["state"], before["optimizer_states"][0]["state"], atol=0, rtol=0
            )
    one = torch.load(tmp_path / "one" / last)["state_dict"]
    assert saved[-1]["global_step"] == total and one.keys() == saved[-1]["state_dict"].keys()
    for k, v in saved[-1]["state_dict"].items():
        torch.testing.assert_close(v, one[k], atol=2e-5, rtol=1e-4, msg=lambda text, k=k: f"{k}: {text}")


@pytest.mark.long
def test_ranks_that_cannot_share_the_batches_are_refused(trained, tmp_path):
    store, run = trained[0], tmp_path / "run"
    done = fit(store, run, "--data.batch_size", 33, "--trainer.max_steps", 2)
    assert done.returncode == 0, done.stderr
    more = ["--trainer.max_steps", 4, "--ckpt_path", "last", *TWO]
    done = fit(store, run, "--data.batch_size", 33, *more)
    assert done.returncode == 2 and "batches of 33 rows over all ranks, which 2 ranks cannot share" in done.stderr
    done = fit(store, run, "--data.batch_size", 17, *more)
    assert done.returncode == 2 and "of {'image': 33, 'text': 33}, this run has {'image': 34" in done.stderr


def test_two_ranks_validate_as_one(trained):
    store, run, _ = trained
    args = ["--data.store", store, "--trainer.default_root_dir", str(run), *SMALL, "--data.batch_size", "17"]
    args += ["--ckpt_path", "last"]
    main(["validate", "-c", RECIPE, *args])
    one = figures(run)
    done = mmsae("validate", *args, *TWO)
    assert done.returncode == 0, done.stderr
    assert len(one) == 17 and figures(run) == pytest.approx(one, abs=1e-6)


def test_streaming_over_uneven_shards(tmp_path):
    """Three training shards of 20, 20 and 5 samples for two ranks, and one rank without anything to validate on.

    Buffers that DDP sends in every forward, its default, would hang here.
    """
    from PIL import Image

    from mmsae.shards import ShardWriter
    from tests.helpers.encoders import MODELS, save_local

    def write(folder, sizes):
        for s, n in enumerate(sizes):
            with ShardWriter(folder, f"part{s}") as w:
                for i in range(n):
                    image = Image.new("RGB", (32, 32), (7 * i % 256, 40 * s, 50))
                    w.write(f"{s}-{i:03d}", {"png": png(image), "txt": f"a red circle {'large ' * (i % 3)}"})
        return str(folder)

    host = save_local(tmp_path / "host", MODELS["vit"])
    data = {
        "shards": write(tmp_path / "train", (20, 20, 5)), "val_shards": write(tmp_path / "val", (23,)), "host": host,
        "batch_size": 6, "read_batch": 5, "buffer_pairs": 12, "workers": 0, "shuffle": 8,
    }  # fmt: skip
    recipe = read_recipe(str(ROOT / "configs/train/paired_topk_store.yaml"))
    recipe["data"] = {"class_path": "datamodules.StreamingActivations", "init_args": data}
    recipe["trainer"] |= {"max_steps": 9, "val_check_interval": 1.0, "check_val_every_n_epoch": 1}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    small = ["--model.sae.init_args.selector.init_args.k", "3", "--trainer.default_root_dir", str(tmp_path / "run")]
    kw = {"recipe": str(tmp_path / "recipe.yaml")}
    done = mmsae("fit", *small, "--trainer.log_every_n_steps", "2", *TWO, *DUMP, **kw)
    assert done.returncode == 0, done.stderr
    a, b = ranks(tmp_path / "run")
    assert [k for k in a["state"] if not torch.equal(a["state"][k], b["state"][k])] == []
    two = figures(tmp_path / "run")
    main(["validate", "-c", kw["recipe"], *small, "--ckpt_path", "last", "--trainer.accelerator", "cpu"])
    one = figures(tmp_path / "run")
    assert len(one) == 17 and two == pytest.approx(one, abs=1e-6)


def png(image):
    out = io.BytesIO()
    image.save(out, "png")
    return out.getvalue()
