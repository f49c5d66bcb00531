"""A tiny paired store, and ``mmsae fit`` on it in a process of its own."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import torch

from mmsae.activations import write_store

ROOT = Path(__file__).parents[2]
RECIPE = str(ROOT / "configs" / "train" / "paired_topk_store.yaml")
SMALL = [
    *("--data.batch_size", "32", "--trainer.accelerator", "cpu", "--model.sae.init_args.ratio", "3"),
    *("--model.sae.init_args.selector.init_args.k", "3", "--trainer.log_every_n_steps", "5"),
    *("--trainer.val_check_interval", "20", "--model.dead_after", "500"),
]


def make_store(folder, n=600, d=16, seed=0, **kw):
    """Pairs that share sparse codes over random atoms, each modality with its own mean."""
    g = torch.Generator().manual_seed(seed)
    codes = torch.rand(n, 2 * d, generator=g) * (torch.rand(n, 2 * d, generator=g) < 0.1)
    shared = codes @ torch.nn.functional.normalize(torch.randn(2 * d, d, generator=g))
    x = {m: shared + s + 0.1 * torch.randn(n, d, generator=g) for m, s in (("image", 1.0), ("text", -1.0))}
    return str(write_store(folder, x, **kw))


def environment():
    """Of a user: one thread, no variables of a launcher, packages of this repository."""
    env = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_PORT")}
    return env | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def command(*args, recipe=RECIPE):
    """The ``mmsae`` command line."""
    return [sys.executable, "-m", "mmsae.cli", args[0], "-c", recipe, *map(str, args[1:])]


def fit(store, run, *args, **kw):
    """``mmsae fit`` to its end; returns the finished process."""
    return mmsae("fit", "--data.store", store, "--trainer.default_root_dir", run, *SMALL, *args, **kw)


def mmsae(*args, recipe=RECIPE, timeout=300, **kw):
    """Any of Lightning's subcommands to its end."""
    return subprocess.run(
        command(*args, recipe=recipe), env=environment(), capture_output=True, text=True, timeout=timeout, **kw
    )


def wait_until(process, ready, timeout=200):
    """Until ``ready()``, or the process is done."""
    import time

    end = time.monotonic() + timeout
    while process.poll() is None and not ready():
        assert time.monotonic() < end, "the process got nowhere"
        time.sleep(0.001)


def kill_when(process, ready, timeout=200):
    """SIGKILL a process once ``ready()``; returns whether it was killed rather than finished."""
    wait_until(process, ready, timeout)
    process.send_signal(signal.SIGKILL)
    return process.wait() == -signal.SIGKILL
