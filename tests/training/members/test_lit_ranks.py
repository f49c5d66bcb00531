"""Members over two processes of gloo are what runs of their own over two processes are, also where one diverges."""

import json

import pytest
import torch

from mmsae import SAE
from tests.helpers.training import fit, make_store

TWO = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.accelerator", "cpu"]
DUMP = ["--trainer.callbacks+", "tests.helpers.rank_dump.DumpRanks"]
pytestmark = pytest.mark.slow


def ranks(run):
    return [torch.load(run / f"rank-{r}.pt") for r in range(2)]


def own(state, name):
    return {k.removeprefix(f"saes.{name}."): v for k, v in state.items() if k.startswith(f"saes.{name}.")}


def test_two_ranks(tmp_path):
    store = make_store(tmp_path / "store", n=313, rows_per_shard=100)
    options = ["--data.batch_size", "17", "--data.block", "16", "--trainer.max_steps", 9, *TWO, *DUMP]
    options += ["--trainer.val_check_interval", "4", "--trainer.log_every_n_steps", "3"]
    options += ["--checkpoint.every_n_train_steps", "4"]
    many = [*options, "--members", '{"a": {"k": 4, "seed": 1}, "b": {}, "mad": {"seed": 2}}']
    many += ["--trainer.callbacks+", "tests.helpers.lit.Spoil", "--trainer.callbacks.member", "mad"]
    many += ["--trainer.callbacks.step", "5"]
    done = fit(store, tmp_path / "many", *many)
    assert done.returncode == 2, done.stderr
    assert "1 of 3 members have no result: mad stopped in step 6: the training diverged" in done.stderr
    one = fit(
        store, tmp_path / "one", *options, "--model.sae.init_args.selector.init_args.k", 4, "--seed_everything", 1
    )
    assert one.returncode == 0, one.stderr
    found, single = ranks(tmp_path / "many"), ranks(tmp_path / "one")
    for rank in range(2):
        state, alone = own(found[rank]["state"], "a"), single[rank]["state"]
        assert state.keys() == alone.keys() and [k for k in state if not torch.equal(state[k], alone[k])] == []
        assert found[rank]["without_grad"] == [] and found[rank]["find_unused"] is False
    for name in ("sae/cfg.json", "sae/sae_weights.safetensors", "sae-best/cfg.json", "latents.json"):
        assert (tmp_path / "many/a" / name).read_bytes() == (tmp_path / "one" / name).read_bytes(), name
    assert done.stdout.count("SAE written to") == 2 and not (tmp_path / "many/mad/sae").exists()
    rows = json.loads((tmp_path / "many/members.json").read_text())["members"]
    assert [r["member"] for r in rows if "fvu/joint" in r] == ["a", "b"] and "stopped in step 6" in rows[2]["stopped"]
    assert rows[2]["last_good"] == 4 and "mad" in (tmp_path / "many/members.md").read_text()
    kept = SAE.from_pretrained(tmp_path / "many/mad/sae-last-good").state_dict()
    assert all(v.isfinite().all() for v in kept.values())

    # gone on with, for more steps, by the two that are left
    again = fit(store, tmp_path / "many", *many, "--trainer.max_steps", 12, "--ckpt_path", "last")
    assert again.returncode == 2 and "going on after step 9" in again.stdout, again.stderr
    b = ranks(tmp_path / "many")
    assert all(torch.equal(own(b[r]["state"], "mad")[f"sae.{k}"], v) for k, v in kept.items() for r in range(2))
    assert [k for k, v in own(b[0]["state"], "b").items() if not torch.equal(v, own(b[1]["state"], "b")[k])] == []
