"""``mmsae fit`` in processes that are killed, also while they write: resumed, they end with the same bytes."""

import random
import re
import signal
import subprocess

import pytest

from tests.helpers.training import SMALL, command, environment, fit, kill_when, make_store, wait_until

OPTIONS = ["--trainer.max_steps", "70", "--checkpoint.every_n_train_steps", "1"]


@pytest.mark.slow
def test_killed_and_resumed_until_done(tmp_path):
    store, run = make_store(tmp_path / "store"), tmp_path / "run"
    done = fit(store, tmp_path / "whole", *OPTIONS)
    assert done.returncode == 0 and done.stderr == "", done.stderr

    def start():
        args = command("fit", "--data.store", store, "--trainer.default_root_dir", run, *SMALL, *OPTIONS)
        return subprocess.Popen([*args, "--ckpt_path", "last"], env=environment(), stdout=subprocess.DEVNULL)

    folder, last = run / "checkpoints", run / "checkpoints" / "last.ckpt"
    after = [random.randrange(3, 30) for _ in range(2)]
    print("kills after", after, "checkpoints")

    def writing(n, seen):
        """The file of a checkpoint is being written, after n finished ones."""
        if last.exists():
            seen.add(last.stat().st_mtime_ns)
        return len(seen) > n and any(folder.glob(".last.ckpt.tmp-*"))

    for n in after:
        seen = set()
        assert kill_when(start(), lambda: writing(n, seen))  # noqa: B023
    done = fit(store, run, *OPTIONS, "--ckpt_path", "last")
    assert done.returncode == 0, done.stderr
    for name in ("sae/sae_weights.safetensors", "sae/cfg.json", "sae-best/sae_weights.safetensors", "latents.json"):
        assert (run / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert not [p for p in run.rglob(".*") if "tmp-" in p.name or "old-" in p.name]


@pytest.mark.slow
def test_told_to_stop_it_writes_a_checkpoint_and_goes_on_exactly(tmp_path):
    """SIGTERM, long before the first periodic checkpoint: no step is lost."""
    store, run = make_store(tmp_path / "store"), tmp_path / "run"
    options = ["--trainer.max_steps", "400", "--checkpoint.every_n_train_steps", "1000"]
    done = fit(store, tmp_path / "whole", *options)
    assert done.returncode == 0, done.stderr
    args = command("fit", "--data.store", store, "--trainer.default_root_dir", run, *SMALL, *options)
    process = subprocess.Popen(args, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_until(process, (run / "sae-best").exists)  # after 20 steps
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 143 and "Traceback" not in err, (process.returncode, out, err)
    step = int(re.search(r"stopped by SIGTERM after step (\d+), which \S+last.ckpt holds; go on", out)[1])
    assert 20 <= step < 400 and not (run / "sae").exists()
    done = fit(store, run, *options, "--ckpt_path", "last")
    assert done.returncode == 0 and f"going on after step {step}" in done.stdout, done.stderr
    for name in ("sae/sae_weights.safetensors", "sae/cfg.json", "sae-best/cfg.json", "latents.json"):
        assert (run / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
